"""ImageDataset: pixels, ids, labels, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moce.data.readers.packed import PixelReader
from moce.data.readers.sample import Label


@dataclass
class ImageDataset:
    """n images of c channels and one size, with unique ids; labels and splits may be None.

    Read pixels with `take`: a subset shares the memory or file of the whole set.
    stored: [m, c, h, w] uint8, read-only. index: [n] int64, the stored row of each image (default:
    its own row). skipped: (id, reason) of images that could not be decoded. reader: of the file
    that `stored` is mapped from; used instead of the mapping, which cannot report errors.
    """

    stored: Tensor
    ids: list[str]
    labels: list[Label | None]
    splits: list[str | None]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reader: PixelReader | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, c, h, w)."""
        channels, height, width = self.stored.shape[1:]
        return len(self), channels, height, width

    @property
    def pixels(self) -> Tensor:
        """All pixels, [n, c, h, w]. Raises ValueError for a subset, which would need a copy."""
        if self.index is not None:
            raise ValueError("a subset has no pixels of its own: use take(slice(None))")
        return self.stored

    def take(self, rows: Tensor | slice) -> Tensor:
        """Pixels [b, c, h, w] uint8 of these rows ([b] int64 or a slice), on the device of `stored`."""
        if self.index is not None:
            rows = self.index[rows if isinstance(rows, slice) else rows.cpu()]
        if self.reader is not None:
            numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            return self.reader.read(numbers)
        if isinstance(rows, slice):
            return self.stored[rows]
        # Many times faster than stored[rows].
        return self.stored.index_select(0, rows.to(self.stored.device))

    def subset(self, rows: Sequence[int]) -> ImageDataset:
        """The images of these rows, in this order, without copying pixels."""
        rows = list(rows)
        if rows == list(range(len(self))):
            return self
        index = torch.tensor(rows, dtype=torch.int64)
        return replace(
            self,
            index=index if self.index is None else self.index[index],
            ids=[self.ids[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            splits=[self.splits[row] for row in rows],
        )
