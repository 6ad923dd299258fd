"""Detection, instance and semantic segmentation: data, metrics, models and pictures."""
