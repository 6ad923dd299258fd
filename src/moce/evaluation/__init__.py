"""Evaluation on labeled tasks: probes on frozen features, and fine-tuning."""
