"""The features a clustering reads: in chunks, from memory or a file, all here or spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moce.errors import MoceError
from moce.runtime.distributed import all_reduce, rank, world_size

CHUNK_SIZE = 4096  # scores of a chunk stay in the cache of the processor
PRECISION = 1e-6  # features whose projections are nearer than this are copies of one image
KEYS = 3  # projections that tell features apart
HASH = (0x5DEECE66D, 0x27BB2EE687B0B0FD, 0x369DEA0F31A53F85)


def chunks(count: int, size: int, within: slice | None = None) -> Iterator[slice]:
    """Slices of at most `size` that cover range(count), or what is within a slice of it."""
    first, end = (within.start, within.stop) if within else (0, count)
    for start in range(first, end, size):
        yield slice(start, min(start + size, end))


@dataclass
class Rows:
    """This process's unit features [n, D] and what to do with them chunk by chunk.

    weights: [n] 0 for a copy of another row, which then does not count; None if there are none.
    spread: whether the other processes hold further rows, in the order of their ranks; sums are
    then over all of them. device: where to compute (default: where the features are).
    """

    features: Tensor
    weights: Tensor | None = None
    chunk_size: int = CHUNK_SIZE
    spread: bool = False
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.device = self.device or self.features.device
        counts = torch.zeros(world_size() if self.spread else 1, dtype=torch.int64)
        here = rank() if self.spread else 0
        counts[here] = len(self.features)
        counts = self.total(counts)
        self.count, self.offset = int(counts.sum()), int(counts[:here].sum())

    def __len__(self) -> int:
        return len(self.features)

    def parts(self) -> Iterator[slice]:
        return chunks(len(self), self.chunk_size)

    def chunk(self, part: slice) -> Tensor:
        """The features of a slice, where they are computed with."""
        return self.features[part].to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.features.dtype, device=self.device)

    def total(self, values: Tensor) -> Tensor:
        """`values` summed over the processes that share the rows, in place."""
        return all_reduce(values) if self.spread else values

    def from_all(self, own: Tensor) -> Tensor:
        """A value of each row, [n] here, of the rows of all processes, [count]."""
        if not self.spread:
            return own
        whole = own.new_zeros(self.count, *own.shape[1:])
        whole[self.own] = own
        return self.total(whole)

    @property
    def own(self) -> slice:
        """Where this process's rows are among all."""
        return slice(self.offset, self.offset + len(self))

    def pick(self, which: Tensor) -> Tensor:
        """The features of some of all rows, [m, D] for m numbers in increasing order."""
        here = (which >= self.offset) & (which < self.offset + len(self))
        picked = self.features.new_zeros(len(which), self.features.shape[1])
        picked[here] = self.features[which[here] - self.offset]
        return self.total(picked.to(self.device))

    def least(self, values: Tensor) -> tuple[float, int]:
        """The smallest of [n] values here and of the other processes', and which row has it.

        The first of equals. Rows are numbered over all processes.
        """
        found = torch.zeros(world_size() if self.spread else 1, 2, dtype=torch.float64)
        here = rank() if self.spread else 0
        found[here, 0] = torch.inf
        if len(values):
            smallest, row = values.min(dim=0)
            found[here] = torch.tensor([float(smallest), self.offset + int(row)])
        self.total(found)
        value, row = found[found[:, 0].argmin()].tolist()
        return value, int(row)


def without_copies(rows: Rows) -> tuple[Rows, int]:
    """The rows with copies weighted 0, and how many distinct ones all processes hold.

    Rows are told apart by random projections in float64. Raises MoceError if a feature is not
    finite.
    """
    keys = rows.from_all(_keys(rows))
    order = keys.argsort(stable=True)
    ordered = keys[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[order[1:]] = ordered[1:] != ordered[:-1]
    count = int(first.sum())
    if count == rows.count:
        return rows, count
    return replace(rows, weights=first[rows.own].to(rows.features.dtype).to(rows.device)), count


def _keys(rows: Rows) -> Tensor:
    """A number for every row here, [n] int64 on the CPU: the same for copies, else different."""
    generator = torch.Generator().manual_seed(0)
    width = rows.features.shape[1]
    projection = torch.randn(width, KEYS, generator=generator, dtype=torch.float64)
    factors = torch.tensor(HASH)
    keys = torch.empty(len(rows), dtype=torch.int64)
    for part in chunks(
        len(rows), rows.chunk_size // 4 or 1
    ):  # small: in float64 it is to stay in cache
        places = rows.features[part].cpu().double() @ projection
        if not places.isfinite().all():
            raise MoceError("some image features are not finite; is the MAE run damaged?")
        keys[part] = ((places / PRECISION).round().long() * factors).sum(dim=1)
    return keys
