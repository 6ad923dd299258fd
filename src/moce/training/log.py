"""metrics.jsonl and, behind a flag, TensorBoard events: one row of numbers per logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moce.errors import MoceError
from moce.processes import is_main
from moce.runs import METRICS, read_metrics, write_text


class MetricLog:
    """Appends rows to the metrics of a run; rows past the step a run resumes from are dropped.

    The main process writes, the others write nothing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resumed_step: int) -> None:
        kept = [row for row in read_metrics(folder) if row["step"] <= resumed_step]
        write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = folder / METRICS
        self._board = open_board(folder) if tensorboard and is_main() else None

    def write(self, row: dict[str, Any]) -> None:
        if not is_main():
            return
        with self._path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in flatten(row).items():
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def open_board(folder: Path) -> Any:
    """A TensorBoard writer. Raises MoceError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MoceError(
            "TensorBoard is not installed: pip install 'moce[tensorboard]', or leave --tensorboard out"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row, named by their path: {"gates": {"9": ...}} gives gates/9/..."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat
