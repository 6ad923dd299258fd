"""Checkpoints: weights and optimiser state of one step in one safetensors file, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moce.errors import MoceError
from moce.runs import STATE, read_tensors, write_tensors

KEPT = 2


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    """Write the state after `step` steps; the newest KEPT files stay."""
    (folder / STATE).mkdir(exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in values.items()}
    write_tensors(folder / STATE / f"step_{step:09d}.safetensors", tensors)
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()


def load_checkpoint(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint in place; the number of steps done (0 without a checkpoint).

    Raises MoceError if it is of another model.
    """
    found = _checkpoints(folder)
    if not found:
        return 0
    tensors = read_tensors(found[-1])
    try:
        model.load_state_dict(_under("model.", tensors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MoceError(f"{found[-1]} is of another model: {reason}") from None
    state: dict[int, dict[str, Any]] = {}
    for key, value in _under("optimiser.", tensors).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(found[-1].stem.removeprefix("step_"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / STATE).glob("step_*.safetensors"))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
