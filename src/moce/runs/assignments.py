"""assignments.parquet: image id to cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
from torch import Tensor

from moce.errors import MoceError, raise_if_corrupt
from moce.runs.files import atomic
from moce.runtime.launch import is_rank0

ASSIGNMENTS = "assignments.parquet"


def write_assignments(run: Path, ids: Sequence[str], clusters: Tensor) -> None:
    """Write the cluster of every training image, [n] int64, by id; on rank 0."""
    if not is_rank0():
        return
    table = pyarrow.table({"id": list(ids), "cluster": clusters.cpu().numpy()})
    with atomic(run / ASSIGNMENTS) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_assignments(run: Path) -> dict[str, int]:
    """The cluster of every training image of a `moce cluster` run, by id.

    Raises MoceError if the file is missing or corrupt.
    """
    try:
        table = pyarrow.parquet.ParquetFile(run / ASSIGNMENTS).read()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise MoceError(f"cannot read {run / ASSIGNMENTS}: {error}") from None
    with raise_if_corrupt(run / ASSIGNMENTS):
        names, clusters = table["id"].to_pylist(), table["cluster"].to_pylist()
        if not all(isinstance(c, int) and c >= 0 for c in clusters):
            raise ValueError("clusters must be integers from 0 on")
        return dict(zip(names, clusters, strict=True))
