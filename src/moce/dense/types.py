"""What a dense task consists of: images with boxes and masks, or with a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moce.data.decode import Raster

DenseTask = Literal["detect", "segment"]
IGNORE = 255  # in semantic masks: a pixel that neither trains nor counts
MOST_CLASSES = IGNORE  # of a semantic mask
RLE = dict[str, Any]  # COCO's packed run lengths of a mask: {"size": [h, w], "counts": bytes}


@dataclass(frozen=True)
class Instances:
    """The objects of an image, in pixels of the upright image.

    boxes: [n, 4] float32, x and y of the upper left, then of the lower right corner; classes: [n]
    int64, indices into the source's classes; masks: one RLE for each, None if the source has boxes
    only; crowd: [n] bool, True for groups without outlines of their own (COCO's iscrowd); areas: [n]
    float64, the pixels of each as the source states them, by which COCO's metric tells small from
    large, None: those of the masks or boxes.
    """

    boxes: np.ndarray
    classes: np.ndarray
    masks: tuple[RLE, ...] | None
    crowd: np.ndarray
    areas: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)


Target = Instances | np.ndarray


@dataclass(frozen=True)
class DenseSample:
    """One image and its truth, both read when called. All of it can be pickled.

    target: Instances, or the class of every pixel, [h, w] int64 with `IGNORE`; both for the upright
    image. split: train, val, test, or None if the source has no splits. size: (h, w) of the upright
    image, None if only the image itself tells. image_id: the image's number in COCO's file.
    """

    id: str
    open: Callable[[], Raster]
    target: Callable[[], Target]
    split: str | None = None
    size: tuple[int, int] | None = None
    image_id: int | None = None


@dataclass
class DenseSource:
    """The images of a dense task. has_masks: the objects of a detection task have masks, too.

    skipped: (id of the image or annotation, reason) of what was left out; clipped: ids of objects
    whose box reached beyond the image and was cut. category_ids: COCO's number of each class.
    """

    name: str
    task: DenseTask
    classes: list[str]
    samples: list[DenseSample]
    has_masks: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)
    category_ids: list[int] | None = None
