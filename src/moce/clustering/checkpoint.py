"""Clustering state, written after every iteration."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from moce.clustering.balanced_kmeans import Iteration
from moce.clustering.features import gather_shards
from moce.errors import MoceError
from moce.runs.files import CHECKSUM, checksum, read_tensor_metadata, read_tensors, write_tensors
from moce.runs.model import STATE
from moce.runtime.distributed import shard_range
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log

FILE = "iteration.safetensors"
TENSORS = ("centroids", "potentials", "assignment")
# As moce 0.1.0 called them.
OLD_FILE = "round.safetensors"
OLD_NAMES = {"settled": "converged"}


def save_iteration(folder: Path, state: Iteration, count: int) -> None:
    """Write the state of a clustering of `count` images, on one or several processes."""
    tensors = {name: getattr(state, name) for name in TENSORS}
    if state.stage:  # a sample is the same in all processes
        tensors["assignment"] = gather_shards(state.assignment, count, shard_range(count))
    if is_rank0():
        names = [field.name for field in fields(Iteration) if field.name not in TENSORS]
        numbers = {name: getattr(state, name) for name in names}
        metadata = {"iteration": json.dumps(numbers), CHECKSUM: checksum(tensors)}
        write_tensors(folder / STATE / FILE, tensors, metadata)


def load_iteration(folder: Path, count: int, device: torch.device) -> Iteration | None:
    """The last saved state; None if there is none or it is corrupt."""
    path = folder / STATE / FILE
    if not path.is_file():
        path = folder / STATE / OLD_FILE
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path), read_tensor_metadata(path)
        numbers = json.loads(metadata.get("iteration") or metadata["round"])
    except (MoceError, KeyError, json.JSONDecodeError):
        tensors, metadata = {}, {}
    if metadata.get(CHECKSUM) != checksum(tensors):
        log(f"warning: {path} is corrupt; the iterations start over")
        return None
    # Clones, so that memory is aligned as before: sums may depend on it.
    assignment = tensors.pop("assignment").clone()
    if numbers["stage"]:
        assignment = assignment[shard_range(count)].clone()
    found: dict[str, Any] = {OLD_NAMES.get(name, name): value for name, value in numbers.items()}
    found |= {name: tensors[name].clone().to(device) for name in ("centroids", "potentials")}
    return Iteration(**found, assignment=assignment)


def metrics_row(state: Iteration) -> dict[str, int | float]:
    """The row of metrics.jsonl of an iteration."""
    names = ("step", "stage", "moved", "marginal_error", "similarity")
    return {name: getattr(state, name) for name in names}
