"""One step-based loop for every stage: optimiser, schedule, checkpoints, logs."""
