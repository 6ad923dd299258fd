"""Run folders: what a command leaves and the next one reads."""
