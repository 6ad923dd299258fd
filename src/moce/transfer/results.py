"""Results of a comparison, as results.json holds them, ready to be looked up and averaged."""

from __future__ import annotations

from typing import Any

import numpy as np

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
