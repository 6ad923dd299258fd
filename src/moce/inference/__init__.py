"""Features, clusters and reconstruction errors of whole image sets."""
