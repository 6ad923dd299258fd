"""One adapter per format of other libraries: tensor names and config files.

An adapter that reads has `matches(raw)`, whether tensors have its names, and `read(raw)`, which
renames them to moce's. Both take RawWeights; `read` returns MAEWeights.
"""
