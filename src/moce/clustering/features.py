"""Features in chunks, on one or several processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moce.errors import MoceError
from moce.models.cluster_model import CHUNK_SIZE
from moce.runtime.distributed import all_reduce, rank, world_size

DUPLICATE_DISTANCE = 1e-6  # features whose projections are closer than this are one image
PROJECTIONS = 3  # random projections that tell features apart
HASH = (0x5DEECE66D, 0x27BB2EE687B0B0FD, 0x369DEA0F31A53F85)


def chunks(count: int, size: int, first: int = 0) -> Iterator[slice]:
    """Slices of at most `size` that cover range(first, count)."""
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))


@dataclass
class Rows:
    """This process's rows of the feature matrix, [n, D] of unit norm, processed in chunks.

    index: [n] the features that are rows, all others are ignored; None if all are. sharded: every
    process holds other rows, in the order of the ranks, and reductions are over all processes.
    device: where to compute (default: the device of the features).
    """

    features: Tensor
    index: Tensor | None = None
    chunk_size: int = CHUNK_SIZE
    sharded: bool = False
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.device = self.device or self.features.device
        counts = torch.zeros(world_size() if self.sharded else 1, dtype=torch.int64)
        here = rank() if self.sharded else 0
        counts[here] = len(self)
        self.all_reduce(counts)
        self.count, self.offset = int(counts.sum()), int(counts[:here].sum())

    def __len__(self) -> int:
        return len(self.features if self.index is None else self.index)

    @property
    def width(self) -> int:
        return self.features.shape[1]

    @property
    def shard(self) -> slice:
        """The numbers of this process's rows among the rows of all processes."""
        return slice(self.offset, self.offset + len(self))

    def chunks(self) -> Iterator[slice]:
        return chunks(len(self), self.chunk_size)

    def chunk(self, where: slice) -> Tensor:
        """The features of some rows, on the device to compute on."""
        index = where if self.index is None else self.index[where]
        return self.features[index].to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.features.dtype, device=self.device)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum `values` in place over the processes that share the rows."""
        return all_reduce(values) if self.sharded else values

    def all_gather(self, values: Tensor) -> Tensor:
        """One value per row, [n] of this process, to those of all processes, [count]."""
        return gather_shards(values, self.count, self.shard) if self.sharded else values

    def from_first(self, values: Tensor) -> Tensor:
        """The first process's `values`: other processes may have rounded differently."""
        return self.all_reduce(values.clone() if self.offset == 0 else torch.zeros_like(values))

    def select(self, numbers: Tensor) -> Tensor:
        """Features [m, D] of these rows of all processes."""
        here = (numbers >= self.offset) & (numbers < self.offset + len(self))
        own = numbers[here] - self.offset
        selected = self.features.new_zeros(len(numbers), self.width)
        selected[here] = self.features[own if self.index is None else self.index[own]]
        return self.all_reduce(selected.to(self.device))

    def draw(self, count: int, seed: int) -> Rows:
        """At most `count` random rows of all processes, in memory, the same in all processes."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.count, generator=generator)[:count].sort().values
        return Rows(self.select(drawn), chunk_size=self.chunk_size)


def gather_shards(values: Tensor, count: int, shard: slice) -> Tensor:
    """Values of all processes, [count, ...], from each process's slice of them."""
    whole = values.new_zeros(count, *values.shape[1:])
    whole[shard] = values
    return all_reduce(whole)


def without_duplicates(rows: Rows) -> Rows:
    """The first row of every set of equal ones, of all processes.

    Raises MoceError if a feature is not finite.
    """
    keys = rows.all_gather(_keys(rows))
    order = keys.argsort(stable=True)
    ordered = keys[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[order[1:]] = ordered[1:] != ordered[:-1]
    if first.all():
        return rows
    return replace(rows, index=first[rows.shard].nonzero()[:, 0].to(rows.features.device))


def _keys(rows: Rows) -> Tensor:
    """A hash of every row, [n] int64 on the CPU, from rounded random projections in float64."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(rows.width, PROJECTIONS, generator=generator, dtype=torch.float64)
    factors = torch.tensor(HASH)
    keys = torch.empty(len(rows), dtype=torch.int64)
    for where in chunks(len(rows), rows.chunk_size // 4 or 1):  # float64: smaller, for the cache
        projected = rows.features[where].cpu().double() @ projection
        if not projected.isfinite().all():
            raise MoceError("some image features are not finite; is the MAE run corrupt?")
        rounded = (projected / DUPLICATE_DISTANCE).round().long()
        keys[where] = (rounded * factors).sum(dim=1)
    return keys
