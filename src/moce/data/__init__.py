"""Images: readers of DATA, decoding, the data set, batches, augmentation, random numbers."""
