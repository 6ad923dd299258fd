"""The networks: plain arguments in, tensors out. No files, no settings."""
