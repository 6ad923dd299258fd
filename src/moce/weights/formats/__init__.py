"""One adapter per format: tensor names and config files of other libraries."""
