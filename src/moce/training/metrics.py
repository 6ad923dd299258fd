"""Running means of the losses; metrics.jsonl and timings.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moce.config import LoggerName
from moce.errors import NotFinite
from moce.runs.files import append_line, read_lines, write_text
from moce.runs.model import METRICS, PICTURES, TIMINGS
from moce.runtime.distributed import all_reduce
from moce.runtime.launch import is_rank0
from moce.training.loggers import close_loggers, log_picture, open_loggers
from moce.training.thread_parallel import Losses

STEPS = "steps"  # key of the step count in a window's state

Row = dict[str, Any]


class MetricLog:
    """Appends rows to metrics.jsonl and timings.jsonl of a run, on rank 0 only.

    metrics.jsonl is reproducible, timings.jsonl depends on the clock. Rows after `resumed_step` are
    dropped from both, and so are pictures; 0: nothing is resumed. loggers:
    also told; config: the settings they record.
    """

    def __init__(
        self,
        folder: Path,
        loggers: Sequence[LoggerName],
        resumed_step: int,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._folder, self._finished = folder, False
        for name in (METRICS, TIMINGS):
            rows = read_lines(folder / name, "step")
            kept = [row for row in rows if resumed_step and row["step"] <= resumed_step]
            write_text(folder / name, "".join(json.dumps(row) + "\n" for row in kept))
        if is_rank0():
            drop_pictures(folder, resumed_step)
        self._loggers = (
            open_loggers(loggers, folder, resumed_step, config or {}) if is_rank0() else []
        )

    def write(self, row: Row, times: Row | None = None, picture: np.ndarray | None = None) -> None:
        """times: of the steps since the last row, if any; picture: [h, w, 3] uint8, for the loggers."""
        if not is_rank0():
            return
        append_line(self._folder / METRICS, row)
        if times is not None:
            append_line(self._folder / TIMINGS, times)
        for logger in self._loggers:
            logger.log_metrics(flatten(row | (times or {})), row["step"])
            if picture is not None:
                log_picture(logger, PICTURES, picture, row["step"])

    def finish(self) -> None:
        """Training came to its end; `close` without it reports a run that was stopped."""
        self._finished = True

    def close(self) -> None:
        close_loggers(self._loggers, finished=self._finished)


def note_of(row: Row, times: Row, measured: str = "") -> str:
    """The summary of a row beside the progress bar. measured: what a monitor found last."""
    wait = 100 * times["data_wait_s"] / max(times["step_s"], 1e-9)
    speed = f"{times['images_per_s']:.0f} images/s, data wait {wait:.1f}%"
    return ", ".join(filter(None, (f"loss {row['loss']:.4f}", measured, speed)))


def picture_steps(folder: Path) -> dict[int, Path]:
    """The pictures of a run by their steps, in order."""
    paths = sorted((folder / PICTURES).glob("step_*.png"))
    return {int(path.stem.removeprefix("step_")): path for path in paths}


def drop_pictures(folder: Path, after: int) -> None:
    """Remove the pictures of later steps."""
    for step, path in picture_steps(folder).items():
        if step > after:
            path.unlink()


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row, named by their path: {"gates": {"9": ...}} becomes gates/9/..."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat


class Window:
    """Sums of losses since the last logged row, kept on the device.

    steps: number of summed steps. After a resume some of them are from the previous process; times
    are of this process only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        self._sums: Losses = {}
        self._start, self._waited, self.steps, self._untimed = time.perf_counter(), 0.0, 0, 0

    def state(self) -> dict[str, Tensor]:
        """The sums and the number of steps, for a checkpoint."""
        return {**{f"sum.{k}": v for k, v in self._sums.items()}, STEPS: torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from another window's `state`, which may be empty in old checkpoints.

        It holds the sums over all processes: rank 0 continues from them, the others from zero.
        """
        sums = {k.removeprefix("sum."): v for k, v in state.items() if k.startswith("sum.")}
        own = 1 if is_rank0() else 0
        self._sums = {name: value.to(self._device) * own for name, value in sums.items()}
        self.steps = self._untimed = int(state.get(STEPS, 0))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within the context as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, losses: Losses, share: float) -> None:
        """Add the losses of a micro-batch that is this share of its batch."""
        self._sums = {  # in the order of the losses; a loaded state has another order
            name: self._sums.get(name, 0) + value.detach().float() * share
            for name, value in losses.items()
        }
        self._finite &= losses["loss"].detach().isfinite()

    def collect(self) -> None:
        """Sum over all processes into rank 0; call before reading or saving the sums."""
        for value in self._sums.values():
            all_reduce(value)
            if not is_rank0():
                value.zero_()

    def row(self, step: int, count: int, batch_size: int, rate: float) -> dict[str, Any]:
        """Means since the last row, reproducible. count: training images; rate: learning rate."""
        means = {name: value.item() / self.steps for name, value in self._sums.items()}
        epoch = round(step * batch_size / count, 4)
        return {"step": step, "epoch": epoch, **means, "lr": rate}

    def times(self, step: int, batch_size: int) -> dict[str, Any]:
        """Speed of this process since the last row: images per second, seconds per step."""
        seconds, steps = time.perf_counter() - self._start, self.steps - self._untimed
        return {
            "step": step,
            "images_per_s": round(steps * batch_size / seconds, 1),
            "step_s": round(seconds / steps, 5),
            "data_wait_s": round(self._waited / steps, 5),
        }

    def check_finite(self, folder: Path) -> None:
        """Raise NotFinite if a loss since the start was not finite; call before writing anything."""
        if int(all_reduce((~self._finite).long())):
            raise NotFinite(f"the loss is not finite; {remedy(folder)}")


def remedy(folder: Path) -> str:
    """Advice for the user when numbers overflow."""
    return (
        f"{folder} keeps the last good state. Start again (--overwrite) with a lower --base-lr, "
        "a longer --warmup, --clip-grad 1 or --precision float32"
    )
