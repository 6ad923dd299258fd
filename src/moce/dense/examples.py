"""Test images with their truth beside the prediction, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moce.dense.dataset import DenseImages
from moce.dense.pictures import draw_instances, draw_mask, side_by_side
from moce.dense.predictor import Predictor, chosen
from moce.dense.types import Instances
from moce.runs.files import atomic

EXAMPLES = "examples.png"
COUNT = 6  # images
MOST_SIDE = 400  # pixels of each picture
SCORE = 0.5  # detections with a lower score are not drawn


def write_examples(folder: Path, predictor: Predictor, images: DenseImages) -> None:
    """Write examples.png: a row per image, truth on the left and prediction on the right."""
    step = max(1, len(images) // COUNT)
    rows = [_pair(predictor, *images.read(row)) for row in range(0, len(images), step)[:COUNT]]
    with atomic(folder / EXAMPLES) as temporary:
        side_by_side(rows).save(temporary, "PNG")


def _pair(predictor: Predictor, pixels: np.ndarray, truth: Any) -> list[Image.Image]:
    (found,) = predictor([pixels])
    if isinstance(truth, Instances):
        assert isinstance(found, dict)
        shown = chosen(found, found["scores"] >= SCORE)
        pair = [draw_instances(pixels, each, predictor.classes) for each in (truth, shown)]
    else:
        assert isinstance(found, np.ndarray)
        pair = [draw_mask(pixels, each, predictor.classes) for each in (truth, found)]
    for picture in pair:
        picture.thumbnail((MOST_SIDE, MOST_SIDE))
    return pair
