"""One step-based loop for every stage: optimizer, schedule, checkpoints, logs."""
