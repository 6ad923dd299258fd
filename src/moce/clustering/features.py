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


def chunks(count: int, size: int, within: slice | None = None) -> Iterator[slice]:
    """Slices of at most `size` that cover range(count), or the slice `within` of it."""
    first, end = (within.start, within.stop) if within else (0, count)
    for start in range(first, end, size):
        yield slice(start, min(start + size, end))


@dataclass
class Rows:
    """This process's rows of the feature matrix, [n, D] of unit norm, processed in chunks.

    weights: [n], 0 for a duplicate of another row, which is ignored; None without duplicates.
    sharded: every process holds other rows, in the order of the ranks, and reductions are over all
    processes. device: where to compute (default: the device of the features).
    """

    features: Tensor
    weights: Tensor | None = None
    chunk_size: int = CHUNK_SIZE
    sharded: bool = False
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.device = self.device or self.features.device
        counts = torch.zeros(world_size() if self.sharded else 1, dtype=torch.int64)
        here = rank() if self.sharded else 0
        counts[here] = len(self.features)
        counts = self.all_reduce(counts)
        self.count, self.offset = int(counts.sum()), int(counts[:here].sum())

    def __len__(self) -> int:
        return len(self.features)

    @property
    def shard(self) -> slice:
        """The numbers of this process's rows among the rows of all processes."""
        return slice(self.offset, self.offset + len(self))

    def chunks(self) -> Iterator[slice]:
        return chunks(len(self), self.chunk_size)

    def chunk(self, where: slice) -> Tensor:
        """A slice of the features, on the device to compute on."""
        return self.features[where].to(self.device)

    def chunk_weights(self, where: slice) -> Tensor | None:
        return None if self.weights is None else self.weights[where]

    def mask(self, values: Tensor) -> Tensor:
        """One value per row, [n], with infinity for duplicates."""
        return values if self.weights is None else values.where(self.weights > 0, torch.inf)

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
        """Features [m, D] of these rows of all processes; [m] in increasing order."""
        here = (numbers >= self.offset) & (numbers < self.offset + len(self))
        selected = self.features.new_zeros(len(numbers), self.features.shape[1])
        selected[here] = self.features[numbers[here] - self.offset]
        return self.all_reduce(selected.to(self.device))

    def min(self, values: Tensor) -> tuple[float, int]:
        """The smallest of one value per row, [n], over all processes, and the number of its row.

        The first row if several have the smallest value.
        """
        found = torch.zeros(world_size() if self.sharded else 1, 2, dtype=torch.float64)
        here = rank() if self.sharded else 0
        found[here, 0] = torch.inf
        if len(values):
            smallest, row = values.min(dim=0)
            found[here] = torch.tensor([float(smallest), self.offset + int(row)])
        self.all_reduce(found)
        value, row = found[found[:, 0].argmin()].tolist()
        return value, int(row)


def gather_shards(values: Tensor, count: int, shard: slice) -> Tensor:
    """Values of all processes, [count, ...], from each process's slice of them."""
    whole = values.new_zeros(count, *values.shape[1:])
    whole[shard] = values
    return all_reduce(whole)


def mask_duplicates(rows: Rows) -> tuple[Rows, int]:
    """The rows with weight 0 for duplicates, and the number of distinct rows of all processes.

    Raises MoceError if a feature is not finite.
    """
    keys = rows.all_gather(_keys(rows))
    order = keys.argsort(stable=True)
    ordered = keys[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[order[1:]] = ordered[1:] != ordered[:-1]
    count = int(first.sum())
    if count == rows.count:
        return rows, count
    return replace(rows, weights=first[rows.shard].to(rows.features.dtype).to(rows.device)), count


def _keys(rows: Rows) -> Tensor:
    """A hash of every row, [n] int64 on the CPU, from rounded random projections in float64."""
    generator = torch.Generator().manual_seed(0)
    width = rows.features.shape[1]
    projection = torch.randn(width, PROJECTIONS, generator=generator, dtype=torch.float64)
    factors = torch.tensor(HASH)
    keys = torch.empty(len(rows), dtype=torch.int64)
    for where in chunks(len(rows), rows.chunk_size // 4 or 1):  # float64: smaller, for the cache
        projected = rows.features[where].cpu().double() @ projection
        if not projected.isfinite().all():
            raise MoceError("some image features are not finite; is the MAE run corrupt?")
        rounded = (projected / DUPLICATE_DISTANCE).round().long()
        keys[where] = (rounded * factors).sum(dim=1)
    return keys
