"""A fit's rounds on disk: written after each, so that a killed clustering goes on where it was."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce.clustering.balanced_kmeans import Iteration
from moce.errors import MoceError
from moce.runs.files import CHECKSUM, checksum, read_tensor_metadata, read_tensors, write_tensors
from moce.runs.model import STATE
from moce.runtime.distributed import all_reduce, is_rank0, shard_range

FILE = "round.safetensors"
TENSORS = ("centroids", "potentials", "assignment", "sample_potentials")


def save_iteration(folder: Path, state: Iteration, count: int) -> None:
    """Keep a round of a fit of `count` images, which all processes may share."""
    assignment = state.assignment
    if state.stage:  # a sample is the same in all processes
        assignment = gathered(assignment, count)
    tensors = {name: getattr(state, name) for name in TENSORS} | {"assignment": assignment}
    if is_rank0():
        numbers = {
            f.name: getattr(state, f.name) for f in fields(Iteration) if f.name not in TENSORS
        }
        metadata = {"round": json.dumps(numbers), CHECKSUM: checksum(tensors)}
        write_tensors(folder / STATE / FILE, tensors, metadata)


def gathered(assignment: Tensor, count: int) -> Tensor:
    """The clusters of all images, [count], from those of every process's share."""
    whole = assignment.new_zeros(count)
    whole[shard_range(count)] = assignment
    return all_reduce(whole)


def load_iteration(folder: Path, count: int, device: torch.device) -> Iteration | None:
    """The last round that was kept; None if there is none that is sound."""
    path = folder / STATE / FILE
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path), read_tensor_metadata(path)
        numbers = json.loads(metadata["round"])
    except (MoceError, KeyError, json.JSONDecodeError):
        return None
    if metadata.get(CHECKSUM) != checksum(tensors):
        return None
    # Copies, for their memory is aligned as it was before: sums may depend on that.
    assignment = tensors.pop("assignment").clone()
    if numbers["stage"]:
        assignment = assignment[shard_range(count)].clone()
    placed: dict[str, Any] = {name: value.clone().to(device) for name, value in tensors.items()}
    return Iteration(**numbers, **placed, assignment=assignment)


def as_row(state: Iteration) -> dict[str, int | float]:
    """How a round went, as a row of metrics."""
    return {
        "step": state.step,
        "stage": state.stage,
        "moved": state.moved,
        "marginal_error": state.marginal_error,
        "similarity": state.similarity,
    }
