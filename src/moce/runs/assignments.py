"""assignments.parquet: image id to cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from pyarrow import compute
from torch import Tensor

from moce.errors import MoceError, raise_if_corrupt
from moce.runs.files import atomic
from moce.runtime.launch import is_rank0

ASSIGNMENTS = "assignments.parquet"
AT_ONCE = 2**20  # images


@dataclass(frozen=True)
class Assignments:
    """Images and their clusters, without an object for each: names, strings; clusters [n] int64."""

    names: pyarrow.Array
    clusters: np.ndarray

    @classmethod
    def of(cls, ids: Iterable[str] = (), clusters: Tensor | None = None) -> Assignments:
        found = np.empty(0, np.int64) if clusters is None else clusters.cpu().numpy()
        return cls(_strings(ids), found)

    def __len__(self) -> int:
        return len(self.clusters)

    def find(self, ids: Iterable[str]) -> np.ndarray:
        """The cluster of each image, [n] int64; -1 for those that are not here.

        Images in the order of the clustering are compared, not looked up.
        """
        found, left, start = [np.empty(0, np.int64)], iter(ids), 0
        clusters = np.append(self.clusters, -1)  # the last is that of row -1
        while len(wanted := _strings(islice(left, AT_ONCE))):
            rows = np.arange(start, start + len(wanted))
            if not wanted.equals(self.names.slice(start, len(wanted))):
                rows = compute.index_in(wanted, value_set=self.names).fill_null(-1).to_numpy()
            found.append(clusters[rows])
            start = int(rows[-1]) + 1
        return np.concatenate(found)

    def joined(self, other: Assignments) -> Assignments:
        names = pyarrow.concat_arrays([self.names, other.names])
        return Assignments(names, np.concatenate([self.clusters, other.clusters]))

    def to_dict(self) -> dict[str, int]:
        """By id."""
        return dict(zip(self.names.to_pylist(), self.clusters.tolist(), strict=True))


def _strings(ids: Iterable[str]) -> pyarrow.Array:
    return pyarrow.array(ids, pyarrow.large_string())


def write_assignments(run: Path, ids: Sequence[str], clusters: Tensor) -> None:
    """Write the cluster of every training image, [n] int64, by id; on rank 0."""
    if not is_rank0():
        return
    table = pyarrow.table({"id": list(ids), "cluster": clusters.cpu().numpy()})
    with atomic(run / ASSIGNMENTS) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_assignments(run: Path) -> Assignments:
    """The cluster of every training image of a `moce cluster` run.

    Raises MoceError if the file is missing or corrupt.
    """
    try:
        table = pyarrow.parquet.ParquetFile(run / ASSIGNMENTS).read()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise MoceError(f"cannot read {run / ASSIGNMENTS}: {error}") from None
    with raise_if_corrupt(run / ASSIGNMENTS):
        names, clusters = table["id"], table["cluster"]
        if not pyarrow.types.is_integer(clusters.type) or clusters.null_count:
            raise ValueError("clusters must be integers from 0 on")
        found = Assignments(
            names.cast(pyarrow.large_string()).combine_chunks(), clusters.to_numpy()
        )
        if len(found) and found.clusters.min() < 0:
            raise ValueError("clusters must be integers from 0 on")
        return found
