"""Large-scale jitter, crop and flip of an image together with its boxes and masks.

torchvision's transforms draw from the global generator, so only its functions are used here, with
random numbers of each image's own: the same after a resume, in any thread and process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from moce.data.rng import Stream, keyed_uniform
from moce.dense import rle
from moce.dense.types import IGNORE, Instances, Target

NUMBERS = 4  # random numbers per view: scale, top, left, flip
LEAST = 1.0  # pixels: objects that a crop leaves with a shorter side are left out

TargetView = dict[str, Tensor] | Tensor


@dataclass(frozen=True)
class Views:
    """What the network sees of an image in training: a square of `size` pixels.

    The image is resized to fill the square (by its longer side, or by its shorter one) times a random
    factor of `jitter`, then cropped, flipped and padded at the right and the bottom by `fill`, a
    value 0..255 per channel, and `IGNORE`. with_masks: instances keep their masks.
    """

    size: int
    jitter: tuple[float, float]
    hflip: bool
    fill: tuple[float, ...]
    by_longer: bool
    with_masks: bool
    seed: int

    def __call__(
        self, pixels: np.ndarray, target: Target, row: int, epoch: int
    ) -> tuple[Tensor, TargetView]:
        """A view of pixels [c, h, w]: [c, size, size] uint8, and its truth.

        The truth is torchvision's dictionary (boxes [n, 4] float32, labels [n] int64 from 1, masks
        [n, size, size] uint8), or the class of every pixel, [size, size] int64.
        """
        uniform = keyed_uniform(
            self.seed, Stream.CROP, torch.tensor([epoch]), torch.tensor([row]), NUMBERS
        )[0].tolist()
        box, resized = self._crop(pixels.shape[1:], uniform)
        flip = self.hflip and uniform[3] < 0.5
        image = tv_tensors.Image(torch.from_numpy(pixels))
        image = self._placed(image, box, resized, flip, list(self.fill))
        if isinstance(target, Instances):
            return image.as_subclass(Tensor), self._instances(target, box, resized, flip)
        mask = tv_tensors.Mask(torch.from_numpy(target)[None])
        return image.as_subclass(Tensor), self._placed(mask, box, resized, flip, IGNORE)[0]

    def _crop(
        self, shape: tuple[int, int], uniform: list[float]
    ) -> tuple[tuple[int, int, int, int], list[int]]:
        """The part of the image that is seen (top, left, height, width), and its size in the view."""
        low, high = self.jitter
        side = max(shape) if self.by_longer else min(shape)
        factor = (low + (high - low) * uniform[0]) * self.size / side
        seen = [min(n, max(1, round(self.size / factor))) for n in shape]
        start = [int(u * (n - s + 1)) for u, n, s in zip(uniform[1:], shape, seen, strict=False)]
        resized = [min(self.size, max(1, round(s * factor))) for s in seen]
        return (start[0], start[1], seen[0], seen[1]), resized

    def _placed(
        self,
        values: Tensor,
        box: tuple[int, int, int, int],
        resized: list[int],
        flip: bool,
        fill: float | list[float],
    ) -> Tensor:
        """An image, mask or boxes in the coordinates of the view."""
        values = F.resized_crop(values, *box, resized, antialias=True)
        if flip:
            values = F.horizontal_flip(values)
        return F.pad(values, [0, 0, self.size - resized[1], self.size - resized[0]], fill=fill)

    def _instances(
        self,
        target: Instances,
        box: tuple[int, int, int, int],
        resized: list[int],
        flip: bool,
    ) -> dict[str, Tensor]:
        """The objects that are seen; crowds do not train."""
        known = np.flatnonzero(~target.crowd)
        # The canvas only bounds the crop, which lies within the image.
        canvas = (box[0] + box[2], box[1] + box[3])
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(target.boxes[known]), format="XYXY", canvas_size=canvas
        )
        placed = self._placed(boxes, box, resized, flip, 0).as_subclass(Tensor)
        kept = ((placed[:, 2:] - placed[:, :2]) >= LEAST).all(dim=1)
        found = {"boxes": placed, "labels": torch.from_numpy(target.classes[known]) + 1}
        if self.with_masks:
            masks = self._masks(target, known[kept.numpy()], box, resized, flip)
            seen = masks.flatten(1).bool().any(dim=1)
            found = {name: values[kept][seen] for name, values in found.items()}
            return {**found, "masks": masks[seen]}
        return {name: values[kept] for name, values in found.items()}

    def _masks(
        self,
        target: Instances,
        rows: np.ndarray,
        box: tuple[int, int, int, int],
        resized: list[int],
        flip: bool,
    ) -> Tensor:
        """Masks [n, size, size] uint8 of these objects."""
        if not len(rows):
            return torch.zeros(0, self.size, self.size, dtype=torch.uint8)
        assert target.masks is not None  # the task has masks
        pixels = rle.decode([target.masks[row] for row in rows], (0, 0))
        masks = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(pixels, np.uint8)))
        return self._placed(masks, box, resized, flip, 0).as_subclass(Tensor)
