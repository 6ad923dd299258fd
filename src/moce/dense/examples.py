"""Test images with their truth beside the prediction, as one picture."""

from __future__ import annotations

from pathlib import Path

from moce.dense.dataset import DenseImages
from moce.dense.predictor import Predictor


def write_examples(folder: Path, predictor: Predictor, images: DenseImages) -> None:
    return None
