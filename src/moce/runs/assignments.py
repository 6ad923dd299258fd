"""assignments.parquet: image id to cluster."""

from __future__ import annotations
from moce.errors import MoceError
from pathlib import Path
from torch import Tensor
from moce.runs.files import atomic
from moce.errors import raise_if_corrupt
from moce.runtime.distributed import is_rank0
import pyarrow.parquet

ASSIGNMENTS = "assignments.parquet"


def write_assignments(run: Path, ids: list[str], clusters: Tensor) -> None:
    """Store the cluster of every training image by its identity."""
    if not is_rank0():
        return
    table = pyarrow.table({"id": ids, "cluster": clusters.cpu().numpy()})
    with atomic(run / ASSIGNMENTS) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_assignments(run: Path) -> dict[str, int]:
    """The cluster of every training image of a `moce cluster` run, by identity."""
    try:
        table = pyarrow.parquet.read_table(run / ASSIGNMENTS)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise MoceError(f"cannot read {run / ASSIGNMENTS}: {error}") from None
    with raise_if_corrupt(run / ASSIGNMENTS):
        names, clusters = table["id"].to_pylist(), table["cluster"].to_pylist()
        if not all(isinstance(c, int) and c >= 0 for c in clusters):
            raise ValueError("its clusters are not numbers from 0 on")
        return dict(zip(names, clusters, strict=True))
