"""Stage 1: balanced clusters of image features, and groups of clusters that gates start from."""
