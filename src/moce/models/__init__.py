"""The networks: plain arguments in, tensors out. torch and timm only; no files, no settings."""
