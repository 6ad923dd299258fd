"""A small student of a customized backbone, compared with the same student pre-trained by MAE."""
