"""Learning rates of small encoders, which `moce.training.defaults` takes."""
