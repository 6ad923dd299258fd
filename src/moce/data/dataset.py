"""ImageDataset: pixels or files of images, with ids, labels, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moce.data.readers.columns import take
from moce.data.readers.packed import PixelReader
from moce.data.readers.sample import Label, Sample
from moce.data.readers.table import SampleTable
from moce.models.fit import Fit


@dataclass(frozen=True)
class Originals:
    """Images as their source has them, each of its own size: what training crops from.

    channels: that images are converted to. max_skipped: the share that may be unreadable; required:
    whether that is an error.
    """

    samples: Sequence[Sample]
    channels: int
    max_skipped: float = 1.0
    required: bool = True


@dataclass
class ImageDataset:
    """n images of c channels, with unique ids; labels and splits may be None.

    Read pixels with `take`: a subset shares the memory or file of the whole set.
    stored: [m, c, h, w] uint8, read-only; None if nothing is decoded before it is used. index: [n]
    int64, the stored row of each image (default: its own row). skipped: (id, reason) of images that
    could not be decoded. reader: of the file that `stored` is mapped from; used instead of the
    mapping, which cannot report errors. originals: the m images of the source; None if `stored` is
    all there is to them. fit: how `stored` was made from them; None if it is the images themselves.
    """

    stored: Tensor | None
    ids: Sequence[str]
    labels: Sequence[Label | None]
    splits: Sequence[str | None]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reader: PixelReader | None = None
    index: Tensor | None = None
    originals: Originals | None = None
    fit: Fit | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, c, h, w) of the pixels. Raises ValueError if none are decoded."""
        channels, height, width = self._pixels().shape[1:]
        return len(self), channels, height, width

    @property
    def pixels(self) -> Tensor:
        """All pixels, [n, c, h, w]. Raises ValueError for a subset, which would need a copy."""
        if self.index is not None:
            raise ValueError("a subset has no pixels of its own: use take(slice(None))")
        return self._pixels()

    def _pixels(self) -> Tensor:
        if self.stored is None:
            raise ValueError("these images are decoded as they are used, and have no pixels")
        return self.stored

    def take(self, rows: Tensor | slice) -> Tensor:
        """Pixels [b, c, h, w] uint8 of these rows ([b] int64 or a slice), on the device of `stored`."""
        if self.index is not None:
            rows = self.index[rows if isinstance(rows, slice) else rows.cpu()]
        if self.reader is not None:
            numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            return self.reader.read(numbers)
        stored = self._pixels()
        if isinstance(rows, slice):
            return stored[rows]
        # Many times faster than stored[rows].
        return stored.index_select(0, rows.to(stored.device))

    def original(self, row: int) -> Sample:
        """The image of a row in its source. Raises ValueError if only pixels are known."""
        if self.originals is None:
            raise ValueError("the originals of these images are not known")
        return self.originals.samples[row if self.index is None else int(self.index[row])]

    @property
    def far_files(self) -> Tensor | None:
        """[n] int64, the file of each image, if files are best read one after the other, else None."""
        samples = None if self.originals is None else self.originals.samples
        if self.stored is not None or not isinstance(samples, SampleTable):
            return None
        if samples.first_rows is None:
            return None
        rows = torch.arange(len(samples)) if self.index is None else self.index
        return torch.searchsorted(torch.from_numpy(samples.first_rows[1:]), rows, right=True)

    def subset(self, rows: Sequence[int] | np.ndarray) -> ImageDataset:
        """The images of these rows, in this order, without copying pixels."""
        numbers = np.array(rows, np.int64)
        if np.array_equal(numbers, np.arange(len(self))):
            return self
        index = torch.from_numpy(numbers)
        return replace(
            self,
            index=index if self.index is None else self.index[index],
            ids=take(self.ids, numbers),
            labels=take(self.labels, numbers),
            splits=take(self.splits, numbers),
        )
