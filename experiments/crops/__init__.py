"""Whether crops from original photographs matter."""
