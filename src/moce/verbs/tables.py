"""Results as a table in plain text."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moce.transfer.results import Results

PROBED = {"MAE": "mae", "MAE+": "mae_plus", "MoCE": "moce"} | {
    "random": "random_route",
    "oracle": "oracle",
}
TUNED = {"| MAE+": "mae_plus", "MoCE": "moce"}
WIDTH = 118


def results_table(content: dict[str, Any]) -> str:
    """A demo's results: accuracy in % (mean ± std over draws), vote share, regret in points."""
    results = Results(content)
    table = Table(box=SIMPLE_HEAD, title="accuracy in %, linear probe | fine-tuned")
    table.add_column("task")
    for title in ("strategy, vote", *PROBED, "regret", *TUNED):
        table.add_column(title, justify="right")
    for task, choice in results.selection.items():
        probed = [_cell(results.values(task, "linear_probe", m)) for m in PROBED.values()]
        tuned = [_cell(results.values(task, "finetune", m)) for m in TUNED.values()]
        choice_cell = f"{choice['strategy']}, {choice['share']:.0%}"
        table.add_row(task, choice_cell, *probed, _points(results.regret(task)), *tuned)
    table.add_section()
    regrets = [regret for task in results.tasks if (regret := results.regret(task)) is not None]
    probed = [_percent(results.average("linear_probe", m)) for m in PROBED.values()]
    tuned = [_percent(results.average("finetune", m)) for m in TUNED.values()]
    table.add_row("mean", "", *probed, _points(float(np.mean(regrets))), *tuned)
    console = Console(width=WIDTH, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _cell(values: list[float]) -> str:
    mean = _percent(float(np.mean(values))) if values else "-"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values):.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"
