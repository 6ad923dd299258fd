"""Images with boxes and masks drawn into them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from moce.dense import rle
from moce.dense.types import IGNORE, Instances

SIDE = 320  # least longer side in pixels: smaller images are enlarged, so that names can be read
NUM_COLORS = 256
BACKGROUNDS = ("background", "0")  # names of class 0
GOLDEN = 0.618034  # of a turn of hue between two classes: neighbors differ most


def _color(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


COLORS = [_color(number) for number in range(NUM_COLORS)]
PALETTE = [
    0,
    0,
    0,
    *(value for color in COLORS[1:] for value in color),
]  # of a mask PNG; 0 is black


def draw_instances(
    pixels: np.ndarray, found: Instances | dict[str, Any], classes: Sequence[str]
) -> Image.Image:
    """An image [c, h, w] uint8 with its objects, or with a predictor's, whose scores are shown, too."""
    if isinstance(found, Instances):
        boxes, labels, masks, scores = found.boxes, found.classes, found.masks, None
    else:
        boxes, labels, masks, scores = (found[n] for n in ("boxes", "labels", "masks", "scores"))
    image, factor = _enlarged(_rgb(pixels))
    if not len(boxes):
        return _to_pil(image)
    colors = [COLORS[int(label) % NUM_COLORS] for label in labels]
    if masks is not None:
        planes = torch.from_numpy(rle.decode(list(masks), pixels.shape[1:]))
        image = draw_segmentation_masks(image, _resized(planes, image), 0.45, colors)
    names = [classes[int(label)] for label in labels]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    corners = torch.from_numpy(np.asarray(boxes, np.float32)) * factor
    return _to_pil(draw_bounding_boxes(image, corners, names, colors, width=2))


def draw_mask(pixels: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image [c, h, w] uint8 with the class of every pixel, [h, w], in its color.

    A class 0 that is the background, by its name or without one, is not drawn.
    """
    image, _ = _enlarged(_rgb(pixels))
    hidden = (0, IGNORE) if classes[0] in BACKGROUNDS else (IGNORE,)
    shown = [int(n) for n in np.unique(mask) if n not in hidden and n < len(classes)]
    if not shown:
        return _to_pil(image)
    planes = torch.from_numpy(np.stack([mask == number for number in shown]))
    colors = [COLORS[number % NUM_COLORS] for number in shown]
    return _to_pil(draw_segmentation_masks(image, _resized(planes, image), 0.6, colors))


def side_by_side(rows: Sequence[Sequence[Image.Image]], gap: int = 6) -> Image.Image:
    """Rows of pictures on white, each as wide as the widest of its column."""
    widths = [max(row[n].width for row in rows) for n in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    size = sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(rows) - 1)
    canvas, top = Image.new("RGB", size, "white"), 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture, width in zip(row, widths, strict=True):
            canvas.paste(picture, (left, top))
            left += width + gap
        top += height + gap
    return canvas


def _rgb(pixels: np.ndarray) -> Tensor:
    """Three channels of an image of any number: the first three, or the first one in gray."""
    image = torch.from_numpy(pixels)
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def _enlarged(image: Tensor) -> tuple[Tensor, int]:
    """The image times a whole factor that makes it large enough, and the factor."""
    factor = max(1, round(SIDE / max(image.shape[1:])))
    larger = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return larger, factor


def _resized(planes: Tensor, image: Tensor) -> Tensor:
    factor = image.shape[1] // planes.shape[1]
    return planes.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
