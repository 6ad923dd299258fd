"""Checkpoints: the state of a run after a step in one safetensors file, written in the background.

They appear whole or not at all. Each holds a checksum of its tensors; if the newest is corrupt, the
previous one is loaded.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from moce.errors import MoceError, NotFinite
from moce.runs.files import (
    CHECKSUM,
    checksum,
    read_tensor_metadata,
    read_tensors,
    write_tensors,
    writing,
)
from moce.runs.model import STATE
from moce.runtime.distributed import all_reduce, barrier, world_size
from moce.runtime.fsdp import full_optimizer_state, full_state, is_sharded, load_full_state
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log
from moce.runtime.system import free_memory
from moce.training.metrics import remedy

KEPT = 2  # checkpoints
MEMORY_SHARE = 0.5  # of the free memory that a copy may take; else training waits for the file


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


class CheckpointWriter:
    """Writes checkpoints in a thread, in order, from copies in memory; a context manager.

    Training goes on once a copy is made. One checkpoint is written at a time, so that memory holds one
    copy, as large as the file. Leaving the context waits for the last.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()
        elif self._writing is not None and self._writing.exception() is not None:
            log(f"warning: {self._writing.exception()}")

    def save(self, state: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start to write the state after `state.step` steps. Call on all ranks; rank 0 writes.

        Raises NotFinite if the weights or the optimizer's averages are not finite: a finite loss can
        still have led to a step that overflows. MoceError: the previous file could not be written.
        """
        self.wait()
        tensors = _tensors_of(state, model, optimizer)
        _check_finite(self._folder, tensors)
        if not is_rank0():
            return
        size = sum(value.nbytes for value in tensors.values())
        if size > MEMORY_SHARE * free_memory():
            log(f"training waits for the checkpoint: no memory for a copy of {size / 2**30:.1f} GB")
            _write(self._folder, state.step, tensors)
            return
        if not is_sharded(model):  # what was gathered is a copy already
            tensors = {name: _copy(value) for name, value in tensors.items()}
        self._writing = self._pool.submit(_write, self._folder, state.step, tensors)

    def check(self) -> None:
        """Raise MoceError if a checkpoint could not be written; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises MoceError if it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def finish(self) -> None:
        """Wait, on all ranks, until the last checkpoint is on disk. Raises MoceError as `wait`."""
        self.wait()
        barrier()


def _tensors_of(
    state: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All of a checkpoint by name; with a sharded model on rank 0 only."""
    tensors = {f"model.{name}": value for name, value in full_state(model).items()}
    for index, values in full_optimizer_state(model, optimizer).items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors |= {f"window.{name}": value for name, value in state.window.items()}
    tensors |= {f"memory.{name}": value for name, value in state.diagnostics.items()}
    return tensors | {f"average.{name}": value for name, value in state.average.items()}


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint and keep the newest KEPT files. Raises MoceError if it cannot be written."""
    path = folder / STATE / f"step_{step:09d}.safetensors"
    try:
        with writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_tensors(path, tensors, {CHECKSUM: checksum(tensors)})
        for old in _checkpoints(folder)[:-KEPT]:
            old.unlink()
    except MoceError as error:
        raise MoceError(
            f"{error}; the previous checkpoint is kept: fix this, then --resume"
        ) from None


def _check_finite(folder: Path, tensors: dict[str, Tensor]) -> None:
    wrong = torch.tensor(int(not all(_is_finite(value) for value in tensors.values())))
    if int(all_reduce(wrong)):
        raise NotFinite(f"the weights are not finite; {remedy(folder)}")


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers are. Their sum is, then, unless it overflows; it takes a fifth of the time."""
    return bool(value.sum().isfinite() or value.isfinite().all())


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
