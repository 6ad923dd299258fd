"""Results as a table in plain text."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = (
    ("MAE", "linear_probe", "mae"),
    ("MAE+", "linear_probe", "mae_plus"),
    ("MoCE", "linear_probe", "moce"),
    ("random", "linear_probe", "random_route"),
    ("oracle", "linear_probe", "oracle"),
    ("MAE+", "finetune", "mae_plus"),
    ("MoCE", "finetune", "moce"),
)
WIDTH = 118


def results_table(results: dict[str, Any]) -> str:
    """A demo's results: accuracy in % (mean ± std over draws), vote share and regret in points."""
    table = Table(box=SIMPLE_HEAD, title="accuracy in %, linear probe | fine-tuned")
    table.add_column("task")
    table.add_column("strategy, vote", justify="right")
    for number, (title, _, _) in enumerate(COLUMNS):
        table.add_column(("| " if number == 5 else "") + title, justify="right")
        if number == 4:
            table.add_column("regret", justify="right")
    values = {(r["task"], r["protocol"], r["method"]): r["values"] for r in results["rows"]}
    for task, choice in results["selection"].items():
        cells = [_cell(values.get((task, *key))) for _, *key in COLUMNS]
        cells.insert(5, f"{100 * regret(values, task):+.1f}")
        table.add_row(task, f"{choice['strategy']}, {choice['share']:.0%}", *cells)
    table.add_section()
    table.add_row("mean", "", *_means(values, list(results["selection"])))
    console = Console(width=WIDTH, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def regret(values: dict[tuple[str, str, str], list[float]], task: str) -> float:
    """Mean accuracy of the best route less that of the selection, linear probe."""
    oracle, chosen = (values[task, "linear_probe", method] for method in ("oracle", "moce"))
    return float(np.mean(oracle) - np.mean(chosen))


def _means(values: dict[tuple[str, str, str], list[float]], tasks: list[str]) -> list[str]:
    cells = [
        f"{100 * np.mean([np.mean(values[task, protocol, method]) for task in tasks]):.1f}"
        for _, protocol, method in COLUMNS
    ]
    cells.insert(5, f"{100 * np.mean([regret(values, task) for task in tasks]):+.1f}")
    return cells


def _cell(values: list[float] | None) -> str:
    if values is None:
        return "-"
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * np.std(values):.1f}"
