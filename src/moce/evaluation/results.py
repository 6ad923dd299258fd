"""rows.jsonl, the one format of results: a row per task, backbone and protocol.

`moce evaluate` writes many rows; `moce probe --out` and `moce finetune` write one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce.runs.files import read_lines, write_text

ROWS = "rows.jsonl"
SELECTIONS_BEFORE = {"oracle": "best_route"}  # names of earlier versions, and today's
KEY = ("task", "backbone", "reference", "selection", "protocol")  # identifies a row


def make_row(
    *,
    task: str,
    data: str,
    backbone: str,
    reference: str,
    protocol: str,
    metric: str,
    labels: int,
    values: Sequence[float],
    selection: str | None = None,
    choice: dict[str, Any] | None = None,
    confusion: list[list[int]] | None = None,
    **details: Any,
) -> dict[str, Any]:
    """A row of rows.jsonl.

    protocol: linear, knn or finetune; labels: labeled images per draw; values: the metric, 0..1, per
    draw of labels; selection: how a MoCE run is customized; choice: what it selected for the task;
    confusion: test images by true and predicted class; details: whatever else the command reports.
    """
    return {
        "task": task,
        "data": data,
        "backbone": backbone,
        "reference": reference,
        "selection": selection,
        "protocol": protocol,
        "metric": metric,
        "labels": labels,
        "values": list(values),
        **details,
        "choice": choice,
        "confusion": confusion,
    }


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace rows.jsonl, so that an interruption leaves either the old or the new file."""
    write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder, none if it has no rows.jsonl; a corrupt row and all after it are left out."""
    rows = [_renamed(row) for row in read_lines(folder / ROWS, "values")]
    return [row for row in rows if row.keys() >= set(KEY)]


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with today's names: version 0.1.0 wrote `how` for `selection`."""
    row = {"selection" if name == "how" else name: value for name, value in row.items()}
    selection = row.get("selection")
    return {**row, "selection": SELECTIONS_BEFORE.get(str(selection), selection)}
