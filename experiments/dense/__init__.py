"""Detection and segmentation on small real data."""
