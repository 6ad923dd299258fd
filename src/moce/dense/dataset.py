"""Images of a dense task, read when they are needed, and which of them train and which test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moce.data.readers.sample import error_line
from moce.dense.images import whole_pixels
from moce.dense.types import DenseSample, DenseSource, Instances, Target
from moce.errors import MoceError

TEST_SHARE = 0.2  # if the source has no splits
MOST_CHECKED = 10_000  # images whose truth is compared when a run is resumed


@dataclass
class DenseImages:
    """Images with their truth. channels: of the encoder; skipped: (id, reason), as in `DenseSource`."""

    samples: Sequence[DenseSample]
    channels: int = 3
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.samples]

    @property
    def labels(self) -> list[str | None]:
        """A checksum of the boxes and classes of each image; None where it would take long to make."""
        checked = len(self) <= MOST_CHECKED
        return [_checksum(sample) if checked else None for sample in self.samples]

    def subset(self, rows: Sequence[int]) -> DenseImages:
        return replace(self, samples=[self.samples[row] for row in rows])

    def read(self, row: int) -> tuple[np.ndarray, Target]:
        """Pixels [c, h, w] uint8 of an upright image, and its truth. Raises MoceError if unreadable."""
        sample = self.samples[row]
        try:
            return whole_pixels(sample.open(), self.channels), sample.target()
        except Exception as error:  # decoders raise errors of any type
            raise MoceError(
                f"cannot read {sample.id}: {error_line(error)}; fix or remove it"
            ) from None


def _checksum(sample: DenseSample) -> str | None:
    target = sample.target()
    if not isinstance(target, Instances):
        return hashlib.sha256(target.tobytes()).hexdigest()
    content = target.boxes.tobytes() + target.classes.tobytes() + target.crowd.tobytes()
    return hashlib.sha256(content).hexdigest()


def split(source: DenseSource, channels: int) -> tuple[DenseImages, DenseImages]:
    """Training and test images.

    Validation images are the test set if there is no other with a truth, else they train. Without
    splits a fifth of the images is the test set. Raises MoceError if one of both is empty.
    """
    named = {sample.split for sample in source.samples}
    if named == {None}:
        order = np.random.default_rng(0).permutation(len(source.samples))
        held = set(order[: max(1, round(TEST_SHARE * len(order)))].tolist())
        tested = [row in held for row in range(len(order))]
    else:
        test = "test" if "test" in named else "val"
        tested = [sample.split == test for sample in source.samples]
    parts = [
        [
            sample
            for sample, is_test in zip(source.samples, tested, strict=True)
            if is_test == wanted
        ]
        for wanted in (False, True)
    ]
    for name, samples in zip(("training", "test"), parts, strict=True):
        if not samples:
            raise MoceError(f"{source.name} has no {name} images; see docs/dense_data.md")
    return (
        DenseImages(parts[0], channels, source.skipped),
        DenseImages(parts[1], channels),
    )
