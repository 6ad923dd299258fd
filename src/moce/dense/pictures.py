"""Pictures with boxes, masks and classes drawn in, by torchvision."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from moce.dense import rle
from moce.dense.types import IGNORE, Instances

Color = tuple[int, int, int]
SMALLEST = 256  # pixels of the longer side; smaller images are enlarged, so that names can be read
MIN_SCORE = 0.5
GOLDEN = 0.618034  # successive hues this far apart stay distinct
ALPHA = 0.5
GAP, TITLE = 8, 14  # pixels


def class_colors(count: int) -> list[Color]:
    """A color for each of `count` classes."""
    hues = [(0.6 + GOLDEN * number) % 1 for number in range(count)]
    found = [colorsys.hsv_to_rgb(hue, 0.85, (1.0, 0.75)[n % 2]) for n, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in found]


def draw_instances(
    pixels: np.ndarray,
    found: Instances | Mapping[str, Any],
    classes: Sequence[str],
    min_score: float = MIN_SCORE,
) -> Image.Image:
    """An image with its objects drawn in: the truth, or predictions with at least `min_score`.

    pixels: [c, h, w] uint8; of other than 1 or 3 channels the first three are shown. found:
    Instances, or a prediction as `DetectionMetric.add` takes it. Small images are enlarged.
    """
    boxes, labels, masks, scores = _parts(found, min_score)
    canvas, scale = _canvas(pixels)
    palette = class_colors(len(classes))
    colors = [palette[label] for label in labels]
    if masks:
        drawn = np.stack([_enlarged(m, scale) for m in rle.decode(masks, _size(pixels))])
        canvas = draw_segmentation_masks(canvas, torch.from_numpy(drawn), ALPHA, colors)
    if len(boxes):
        names = [classes[label] for label in labels]
        if scores is not None:
            names = [f"{n} {score:.2f}" for n, score in zip(names, scores, strict=True)]
        corners = torch.from_numpy(boxes * scale)
        canvas = draw_bounding_boxes(canvas, corners, names, colors, width=2)
    return _image(canvas)


def _parts(
    found: Instances | Mapping[str, Any], min_score: float
) -> tuple[np.ndarray, list[int], list[Any] | None, list[float] | None]:
    if isinstance(found, Instances):
        masks = None if found.masks is None else list(found.masks)
        return found.boxes, found.classes.tolist(), masks, None
    scores = np.asarray(found["scores"], np.float64)
    rows = np.flatnonzero(scores >= min_score)
    boxes = np.asarray(found["boxes"], np.float32).reshape(-1, 4)[rows]
    labels = np.asarray(found["labels"], np.int64)[rows].tolist()
    masks = found.get("masks")
    return boxes, labels, [masks[r] for r in rows] if masks else None, scores[rows].tolist()


def draw_mask(pixels: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image with the classes of its pixels drawn in; those that are `IGNORE` stay as they are.

    pixels: [c, h, w] uint8; mask: [h, w] integers.
    """
    canvas, scale = _canvas(pixels)
    palette = class_colors(len(classes))
    present = [label for label in np.unique(mask).tolist() if label != IGNORE]
    if present:
        drawn = np.stack([_enlarged(mask == label, scale) for label in present])
        colors = [palette[label] for label in present]
        canvas = draw_segmentation_masks(canvas, torch.from_numpy(drawn), ALPHA, colors)
    return _image(canvas)


def side_by_side(
    pictures: Sequence[Image.Image], titles: Sequence[str] = ("truth", "prediction")
) -> Image.Image:
    """Pictures in a row on white, each with a title above it."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    height = max(picture.height for picture in pictures) + TITLE
    row, x = Image.new("RGB", (width, height), "white"), 0
    for picture, title in zip(pictures, titles, strict=True):
        ImageDraw.Draw(row).text((x, 1), title, fill="black")
        row.paste(picture, (x, TITLE))
        x += picture.width + GAP
    return row


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[1], pixels.shape[2]


def _canvas(pixels: np.ndarray) -> tuple[Tensor, int]:
    """[3, h, w] uint8, enlarged by a whole number if the image is small."""
    shown = np.repeat(pixels[:1], 3, 0) if len(pixels) < 3 else pixels[:3]
    scale = max(1, SMALLEST // max(_size(pixels)))
    return torch.from_numpy(np.ascontiguousarray(_enlarged(shown, scale))), scale


def _enlarged(values: np.ndarray, scale: int) -> np.ndarray:
    return values.repeat(scale, -1).repeat(scale, -2)


def _image(canvas: Tensor) -> Image.Image:
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())
