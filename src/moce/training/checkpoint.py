"""Checkpoints: all that a run goes on from after one step in one safetensors file, written atomically.

Each holds a checksum of its tensors. A damaged one is passed over for the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moce.errors import MoceError
from moce.runs.files import CHECKSUM, checksum, read_tensor_metadata, read_tensors, write_tensors
from moce.runs.model import STATE
from moce.runtime.progress import log

KEPT = 2


@dataclass
class Checkpoint:
    """What a checkpoint holds beside the model and the optimizer.

    step: steps done; window: sums since the last logged row; memory: of the stage's diagnostics.
    """

    step: int
    window: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, state: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write the state after `state.step` steps; the newest KEPT files stay."""
    (folder / STATE).mkdir(exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors |= {f"window.{name}": value for name, value in state.window.items()}
    tensors |= {f"memory.{name}": value for name, value in state.memory.items()}
    path = folder / STATE / f"step_{state.step:09d}.safetensors"
    try:
        write_tensors(path, tensors, {CHECKSUM: checksum(tensors)})
    except MoceError as error:
        raise MoceError(
            f"{error}; the checkpoint before it stays: mend that and go on with --resume"
        ) from None
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint | None:
    """Load the newest sound checkpoint in place; None without a checkpoint.

    Raises MoceError if it is of another model, or if there are checkpoints but all are damaged.
    """
    found = _newest_sound(folder)
    if found is None:
        return None
    path, tensors = found
    try:
        model.load_state_dict(_under("model.", tensors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MoceError(f"{path} is of another model: {reason}") from None
    state: dict[int, dict[str, Any]] = {}
    for key, value in _under("optimizer.", tensors).items():
        index, name = key.split(".", 1)
        # A copy, for its memory is aligned as the optimizer's own: sums may depend on that.
        state.setdefault(int(index), {})[name] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    step = int(path.stem.removeprefix("step_"))
    return Checkpoint(step, _under("window.", tensors), _under("memory.", tensors))


def _newest_sound(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole, and its tensors; None if there are no checkpoints."""
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, _read_checked(path)
        except MoceError as error:
            log(f"warning: {error}; going back to the checkpoint before it")
    if paths:
        raise MoceError(f"all checkpoints of {folder} are damaged; start again with --overwrite")
    return None


def _read_checked(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    if read_tensor_metadata(path).get(CHECKSUM) != checksum(tensors):
        raise MoceError(f"{path} is damaged: its checksum is wrong")
    return tensors


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / STATE).glob("step_*.safetensors"))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
