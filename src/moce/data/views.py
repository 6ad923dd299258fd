"""What training sees of an image: a random crop, flipped or not, and what a policy makes of it.

Crops come from the whole original image, at its own resolution. Images that are all tiny and of one
size are cropped as a batch, on the training device; others one by one, by the processes that decode
them (loader.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moce.data.augment import TRIES, augment, random_crops
from moce.data.decode import resized_box, upright_size
from moce.data.readers.sample import Sample
from moce.data.rng import Stream, keyed_uniform

Policy = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Views:
    """Random crops and flips, drawn for each image and epoch.

    size: (h, w) of the views. smallest_crop: least share of the image's area. policy: from the views
    of a batch, uint8 [b, c, h, w], with rows and epochs, [b] int64 each, to uint8 of the same shape;
    it must depend on nothing else, not even on the batch.
    """

    seed: int
    size: tuple[int, int]
    smallest_crop: float
    hflip: bool
    policy: Policy | None = None

    def numbers(self, rows: Tensor, epochs: Tensor) -> Tensor:
        """The random numbers of images, [b, 1 + 4 * TRIES] in [0, 1): for the flip, then the crop."""
        return keyed_uniform(self.seed, Stream.CROP, epochs, rows, 1 + 4 * TRIES)

    def of_pixels(self, pixels: Tensor, rows: Tensor, epochs: Tensor) -> Tensor:
        """Float32 0..255 [b, c, h, w] from uint8 images of one size; uint8 if there is a policy."""
        views = augment(
            pixels, self.numbers(rows, epochs), self.size, self.smallest_crop, self.hflip
        )
        if self.policy is None:
            return views
        return self.policy(views.round().to(torch.uint8), rows, epochs)

    def of_sample(self, sample: Sample, numbers: Tensor, channels: int) -> np.ndarray:
        """[c, h, w] uint8 from an original, before the policy. Decoders raise errors of any type.

        numbers: [1 + 4 * TRIES], see `numbers`.
        """
        image = sample.open()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            boxes = random_crops(numbers[None, 1:], upright_size(image), self.smallest_crop)
            pixels = resized_box(image, boxes[0].tolist(), self.size, channels)
        return pixels[:, :, ::-1] if self.hflip and numbers[0] < 0.5 else pixels
