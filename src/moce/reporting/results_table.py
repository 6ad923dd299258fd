"""Results of a comparison, as results.json holds them, ready to be looked up and averaged."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PROTOCOLS = {
    "linear_probe": ("Linear probe", ("mae", "mae_plus", "moce", "random_route", "oracle")),
    "finetune": ("Fine-tuned", ("mae", "mae_plus", "moce")),
}


class Results:
    """results.json by task, protocol and method. Accuracies are 0..1."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.selection: dict[str, dict[str, Any]] = content["selection"]
        self.seconds: dict[str, float] = content.get("seconds", {})
        self._values = {
            (row["task"], row["protocol"], row["method"]): row["values"] for row in content["rows"]
        }
        self.tasks = list(dict.fromkeys(row["task"] for row in content["rows"]))

    def columns(self) -> list[tuple[str, str]]:
        """The (protocol, method) pairs that have results, in the page's order."""
        present = {key[1:] for key in self._values}
        pairs = [(name, method) for name, (_, methods) in PROTOCOLS.items() for method in methods]
        return [pair for pair in pairs if pair in present]

    def values(self, task: str, protocol: str, method: str) -> list[float]:
        """One accuracy per draw of labels; none if it was not measured."""
        return self._values.get((task, protocol, method), [])

    def mean(self, task: str, protocol: str, method: str) -> float | None:
        values = self.values(task, protocol, method)
        return float(np.mean(values)) if values else None

    def average(self, protocol: str, method: str) -> float | None:
        """Mean over the tasks; None unless all have a result."""
        means = [self.mean(task, protocol, method) for task in self.tasks]
        known = [mean for mean in means if mean is not None]
        return float(np.mean(known)) if known and len(known) == len(means) else None

    def regret(self, task: str) -> float | None:
        """Mean probe accuracy of the oracle less that of MoCE's selection."""
        oracle, chosen = (self.mean(task, "linear_probe", m) for m in ("oracle", "moce"))
        return None if oracle is None or chosen is None else oracle - chosen


def suite_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `moce evaluate` as Markdown: tasks by backbones, the metric in %, mean ± std over draws.

    One table per protocol; its last row is the mean over the tasks, where a backbone has them all.
    """
    return "\n\n".join(
        _protocol_table(protocol, [row for row in rows if row["protocol"] == protocol])
        for protocol in dict.fromkeys(row["protocol"] for row in rows)
    )


def _protocol_table(protocol: str, rows: list[dict[str, Any]]) -> str:
    cells = {(row["task"], row["backbone"]): row for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    lines = [
        f"| {protocol} | labels | metric | " + " | ".join(backbones) + " |",
        "|---|--:|---|" + "--:|" * len(backbones),
    ]
    for task in tasks:
        of_task = [cells.get((task, backbone)) for backbone in backbones]
        one = next(row for row in of_task if row)
        shown = [_percent_cell(row["values"]) if row else "" for row in of_task]
        lines.append(f"| {task} | {one['labels']} | {one['metric']} | " + " | ".join(shown) + " |")
    means = [
        [float(np.mean(cells[task, backbone]["values"])) for task in tasks]
        if all((task, backbone) in cells for task in tasks)
        else []
        for backbone in backbones
    ]
    shown = [f"**{100 * np.mean(values):.1f}**" if values else "" for values in means]
    lines.append("| **mean** | | | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _percent_cell(values: list[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values):.1f}"


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
