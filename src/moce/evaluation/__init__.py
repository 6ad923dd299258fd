"""Labeled tasks: what a backbone is worth, by probes on frozen features and by fine-tuning."""
