"""timm's RandAugment and random erasing, repeatable per image.

Both use the global generators of Python and NumPy, which are seeded here for every image: the result
depends only on seed, image and epoch, so a resumed run repeats it. RandAugment works on PIL images on
the CPU, a few milliseconds per image at 224 pixels: in the processes that make views ahead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from moce.data.rng import Stream, keyed_uniform
from moce.errors import MoceError
from moce.models.encoder import EncoderSpec

Policy = Callable[[Image.Image], Image.Image]
TRANSLATION = 0.45  # largest shift, share of the shorter side (timm's)


def read_policy(text: str, spec: EncoderSpec, size: tuple[int, int]) -> Policy | None:
    """The RandAugment of a timm policy string, for images of `size` (h, w); None if it is empty.

    Raises MoceError if timm cannot read it.
    """
    if not text:
        return None
    arguments = {
        "translate_const": int(TRANSLATION * min(size)),
        "img_mean": tuple(round(255 * mean) for mean in spec.mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        policy = rand_augment_transform(text, arguments)
    except (AssertionError, ValueError, KeyError):
        raise MoceError(
            f"rand_augment '{text}' is not a timm policy such as rand-m9-mstd0.5-inc1"
        ) from None
    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return policy


def posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    """Keep `bits` bits per channel, at least one.

    At the largest magnitude timm's own asks for none, which recent versions of Pillow refuse.
    """
    return ImageOps.posterize(image, max(1, min(8, bits)))


def image_keys(seed: int, rows: Tensor, epochs: Tensor) -> list[list[int]]:
    """Two seeds per image of a batch: for RandAugment and for erasing. rows, epochs: [b] int64."""
    uniform = keyed_uniform(seed, Stream.POLICY, epochs, rows, 2)
    return (uniform * 2**24).long().T.tolist()


@dataclass(frozen=True)
class RandAugment:
    """The policy of `Views`."""

    seed: int
    policy: Policy

    def __call__(self, pixels: Tensor, rows: Tensor, epochs: Tensor) -> Tensor:
        """From and to uint8 [b, 3, h, w]."""
        return rand_augmented(pixels, image_keys(self.seed, rows, epochs)[0], self.policy)


def rand_augmented(pixels: Tensor, keys: list[int], policy: Policy) -> Tensor:
    """Apply the policy to every image. pixels: uint8 [b, 3, h, w]; returns the same shape and dtype."""
    images = pixels.permute(0, 2, 3, 1).cpu().numpy()
    changed = np.empty_like(images)
    for row, key in enumerate(keys):
        with _drawing(key):
            changed[row] = np.asarray(policy(Image.fromarray(images[row])))
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(pixels.device)


def erase(images: Tensor, keys: list[int], probability: float) -> Tensor:
    """Fill a rectangle of some images with noise, in place. images: normalized, [b, 3, h, w].

    `keys` seed the rectangles and their noise.
    """
    if probability == 0:
        return images
    # On the CPU, where seeding is fast; a GPU would draw other numbers.
    eraser = RandomErasing(probability, mode="pixel", device="cpu")
    with torch.random.fork_rng(devices=[]):
        for image, key in zip(images, keys, strict=True):
            with _drawing(key):
                torch.default_generator.manual_seed(key)
                eraser(image)
    return images


@contextmanager
def _drawing(key: int) -> Iterator[None]:
    """Seed Python's and NumPy's generators with `key`; restore their state afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from these
    random.seed(key)
    np.random.seed(key)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
