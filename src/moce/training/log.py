"""metrics.jsonl, timings.jsonl and, behind a flag, TensorBoard events: a row per logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moce.errors import MoceError
from moce.processes import is_main
from moce.runs import METRICS, TIMINGS, append_line, read_lines, write_text

Row = dict[str, Any]


class MetricLog:
    """Appends rows to the logs of a run; rows past the step a run resumes from are dropped.

    Two files: metrics.jsonl is the same for the same settings, timings.jsonl is of the clock. The main
    process writes, the others write nothing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resumed_step: int) -> None:
        self._folder = folder
        for name in (METRICS, TIMINGS):
            rows = read_lines(folder / name, "step")
            lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= resumed_step]
            write_text(folder / name, "".join(lines))
        self._board = open_board(folder, resumed_step) if tensorboard and is_main() else None

    def write(self, row: Row, times: Row) -> None:
        if not is_main():
            return
        append_line(self._folder / METRICS, row)
        append_line(self._folder / TIMINGS, times)
        if self._board is not None:
            for name, value in flatten(row | times).items():
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def open_board(folder: Path, resumed_step: int) -> Any:
    """A TensorBoard writer; events past `resumed_step` are hidden. Raises MoceError without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MoceError(
            "TensorBoard is not installed: pip install 'moce[tensorboard]', or leave --tensorboard out"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row, named by their path: {"gates": {"9": ...}} gives gates/9/..."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat
