"""Checkpoints: the state of a run after a step in one safetensors file, written atomically.

Each holds a checksum of its tensors; if the newest is corrupt, the previous one is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from moce.errors import MoceError, NotFinite
from moce.runs.files import CHECKSUM, checksum, read_tensor_metadata, read_tensors, write_tensors
from moce.runs.model import STATE
from moce.runtime.distributed import all_reduce, world_size
from moce.runtime.fsdp import full_optimizer_state, full_state, load_full_state
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log
from moce.training.metrics import remedy

KEPT = 2  # checkpoints


@dataclass
class Checkpoint:
    """What a checkpoint holds beside the model and the optimizer.

    step: steps done; window: sums since the last logged row; diagnostics: state of the objective's; average: of
    the weights, if there is one.
    """

    step: int
    window: dict[str, Tensor] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, state: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write the state after `state.step` steps and keep the newest KEPT files. Call on all ranks.

    Raises NotFinite if the weights or the optimizer's averages are not finite: a finite loss can
    still have led to a step that overflows. MoceError: the file cannot be written.
    """
    tensors = {f"model.{name}": value for name, value in full_state(model).items()}
    for index, values in full_optimizer_state(model, optimizer).items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    _check_finite(folder, tensors)
    if not is_rank0():
        return
    tensors |= {f"window.{name}": value for name, value in state.window.items()}
    tensors |= {f"memory.{name}": value for name, value in state.diagnostics.items()}
    tensors |= {f"average.{name}": value for name, value in state.average.items()}
    (folder / STATE).mkdir(exist_ok=True)
    path = folder / STATE / f"step_{state.step:09d}.safetensors"
    try:
        write_tensors(path, tensors, {CHECKSUM: checksum(tensors)})
    except MoceError as error:
        raise MoceError(
            f"{error}; the previous checkpoint is kept: fix this, then --resume"
        ) from None
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()


def _check_finite(folder: Path, tensors: dict[str, Tensor]) -> None:
    wrong = torch.tensor(int(not all(value.isfinite().all() for value in tensors.values())))
    if int(all_reduce(wrong)):
        raise NotFinite(f"the weights are not finite; {remedy(folder)}")


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint | None:
    """Load the newest checkpoint that is not corrupt, in place; None if there are no checkpoints.

    Raises MoceError if it does not fit the model, or if all checkpoints are corrupt.
    """
    found = _newest_sound(folder)
    if found is None:
        return None
    path, tensors = found
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under("optimizer.", tensors).items():
        index, name = key.split(".", 1)
        # Cloned, to be aligned in memory as the optimizer's own: sums may depend on that.
        state.setdefault(int(index), {})[name] = value.clone()
    try:
        load_full_state(model, optimizer, _under("model.", tensors), state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MoceError(f"{path} is of another model: {reason}") from None
    step = int(path.stem.removeprefix("step_"))
    parts = (_under(prefix, tensors) for prefix in ("window.", "memory.", "average."))
    return Checkpoint(step, *parts)


def check_agreed(done: int) -> None:
    """Raise MoceError if the processes have found different checkpoints to resume from."""
    total = int(all_reduce(torch.tensor(done)))
    differ = int(all_reduce(torch.tensor(int(total != done * world_size()))))
    if differ:
        raise MoceError(
            "the processes find different checkpoints; the output folder has to be on a disk that all "
            "nodes share"
        )


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has a state to resume from."""
    return bool(_checkpoints(folder))


def _newest_sound(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """The newest checkpoint that is not corrupt, and its tensors; None if there are no checkpoints."""
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, _read_checked(path)
        except MoceError as error:
            log(f"warning: {error}; loading the previous checkpoint")
    if paths:
        raise MoceError(f"all checkpoints of {folder} are corrupt; start again with --overwrite")
    return None


def _read_checked(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    if read_tensor_metadata(path).get(CHECKSUM) != checksum(tensors):
        raise MoceError(f"{path} is corrupt: its checksum is wrong")
    return tensors


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / STATE).glob("step_*.safetensors"))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
