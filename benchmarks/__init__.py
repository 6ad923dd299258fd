"""Measurements of speed against other libraries; each keeps its raw numbers in results/."""
