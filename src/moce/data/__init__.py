"""Images in: sources of files, decoding, batches of tensors, augmentation, keyed randomness."""
