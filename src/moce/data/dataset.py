"""Images as one uint8 tensor: decoded and resized once, in parallel, held in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moce.data.readers.packed import PixelReader
from moce.data.readers.torchvision import Label


@dataclass
class ImageDataset:
    """Images [n, c, h, w] uint8 with n stable names (ids) and their labels, or None, and splits.

    Look at the pixels by `take`: the set may be a part of what is stored, and that may be a file.
    stored: [m, c, h, w] uint8, not to be written to. index: [n] int64, the stored row of each
    image; None where it is its own. skipped: (id, reason) of images that could not be decoded.
    reader: of the file that `stored` is mapped from; `take` goes by it, because a mapping has no
    way to tell that it cannot be read.
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
        """All that is stored, [n, c, h, w]. Raises ValueError of a part: that would be a copy."""
        if self.index is not None:
            raise ValueError("a part of what is stored: use take, take(slice(None)) for all of it")
        return self.stored

    def take(self, rows: Tensor | slice) -> Tensor:
        """Pixels of these rows ([b] int64 or a slice), uint8 [b, c, h, w] on the device of `stored`."""
        if self.index is not None:
            rows = self.index[rows if isinstance(rows, slice) else rows.cpu()]
        if self.reader is not None:
            numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            return self.reader.read(numbers)
        if isinstance(rows, slice):
            return self.stored[rows]
        return self.stored.index_select(
            0, rows.to(self.stored.device)
        )  # many times as fast as [rows]

    def subset(self, rows: Sequence[int]) -> ImageDataset:
        """The images of these rows, in this order. Their pixels are not copied."""
        picked = list(rows)
        if picked == list(range(len(self))):
            return self
        pick = lambda values: [values[row] for row in picked]  # noqa: E731
        index = torch.tensor(picked, dtype=torch.int64)
        return replace(
            self,
            index=index if self.index is None else self.index[index],
            ids=pick(self.ids),
            labels=pick(self.labels),
            splits=pick(self.splits),
        )
