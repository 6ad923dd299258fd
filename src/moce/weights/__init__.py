"""Weights of other libraries, in and out: one adapter file per format; names live here, not in models."""
