"""Stage 1: balanced clusters of image features, and the model that assigns unseen images to them."""
