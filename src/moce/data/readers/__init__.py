"""The kinds of sources of images, a file each; `moce.data.sources` decides which one reads what."""
