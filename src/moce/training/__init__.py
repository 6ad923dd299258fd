"""Training: the loop, its objectives, optimizer, checkpoints and logs."""
