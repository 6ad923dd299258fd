"""One file per kind of source that DATA can name."""
