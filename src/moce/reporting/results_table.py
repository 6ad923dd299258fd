"""Tables of results: tasks by backbones, in %, mean ± standard deviation over draws of labels."""

from __future__ import annotations

from typing import Any

import numpy as np

LEADING = 3  # columns before the backbones: task, labels, metric


class Results:
    """Rows of rows.jsonl, the last of each task, protocol and backbone. Values are 0..1."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = {(row["task"], row["protocol"], row["backbone"]): row for row in rows}
        self.tasks = _distinct(rows, "task")
        self.protocols = _distinct(rows, "protocol")

    def where(self, **wanted: str) -> list[dict[str, Any]]:
        """The rows with these values, e.g. where(task="digits", protocol="linear")."""
        rows = self._rows.values()
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def backbones(self, protocol: str) -> list[str]:
        return _distinct(self.where(protocol=protocol), "backbone")

    def values(self, task: str, protocol: str, backbone: str) -> list[float]:
        """One value per draw of labels; empty if it was not measured."""
        row = self._rows.get((task, protocol, backbone))
        return row["values"] if row else []

    def mean(self, task: str, protocol: str, backbone: str) -> float | None:
        values = self.values(task, protocol, backbone)
        return float(np.mean(values)) if values else None

    def average(self, protocol: str, backbone: str) -> float | None:
        """Mean over the protocol's tasks; None unless all of them have a result."""
        tasks = _distinct(self.where(protocol=protocol), "task")
        return _mean_of_all([self.mean(task, protocol, backbone) for task in tasks])

    def choice(self, task: str, **wanted: str) -> dict[str, Any] | None:
        """What the first MoCE run with a strategy selected for a task, before any adaptation."""
        row = self._chosen(task=task, **wanted)
        return row["choice"] if row else None

    def regret(self, task: str, protocol: str) -> float | None:
        """The best strategy's (else route's) mean minus that of the selection of the same MoCE run."""
        chosen = self._chosen(task=task, protocol=protocol)
        if not chosen:
            return None
        alike = {"task": task, "protocol": protocol, "reference": chosen["reference"]}
        for selection in ("best_strategy", "best_route"):
            for best in self.where(**alike, selection=selection):
                return float(np.mean(best["values"])) - float(np.mean(chosen["values"]))
        return None

    def _chosen(self, **wanted: str) -> dict[str, Any] | None:
        rows = [row for row in self.where(**wanted) if not row.get("adaptation")]
        return next((row for row in rows if "votes" in (row.get("choice") or {})), None)


def _distinct(rows: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _mean_of_all(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def results_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table per protocol; the last row is the mean over tasks of complete columns."""
    results = Results(rows)
    tables = [protocol_table(results, protocol) for protocol in results.protocols]
    return "\n\n".join(markdown(*table) for table in tables)


def protocol_table(results: Results, protocol: str) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of one protocol; the last row holds the means over tasks.

    Columns: task, labels, metric, a backbone each and, of MoCE runs, regret in points and the
    strategy with the vote share of the route that won.
    """
    rows, backbones = results.where(protocol=protocol), results.backbones(protocol)
    columns = [protocol, "labels", "metric", *backbones, "regret", "strategy, vote"]
    lines, regrets = [], []
    for task in _distinct(rows, "task"):
        first = next(row for row in rows if row["task"] == task)
        cells = [percent_cell(results.values(task, protocol, name)) for name in backbones]
        regrets.append(results.regret(task, protocol))
        choice = choice_cell(results.choice(task, protocol=protocol))
        labels = str(first["labels"])
        lines.append([task, labels, first["metric"], *cells, _points(regrets[-1]), choice])
    averages = [results.average(protocol, name) for name in backbones]
    cells = [percent_cell([] if a is None else [a]) for a in averages]
    lines.append(["mean", "", "", *cells, _points(_mean_of_all(regrets)), ""])
    always = LEADING + len(backbones)
    kept = [n for n in range(len(columns)) if n < always or any(line[n] for line in lines)]
    return [columns[n] for n in kept], [[line[n] for n in kept] for line in lines]


def percent_cell(values: list[float]) -> str:
    """Mean ± standard deviation in %; no deviation of a single value."""
    if not values:
        return ""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values):.1f}"


def choice_cell(choice: dict[str, Any] | None) -> str:
    return f"{choice['strategy']}, {choice['share']:.0%}" if choice else ""


def _points(difference: float | None) -> str:
    return "" if difference is None else f"{100 * difference:+.1f}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, its last row in bold; numbers are set to the right."""
    rows = [*rows[:-1], [f"**{cell}**" if cell else "" for cell in rows[-1]]]
    left = [number in (0, LEADING - 1) for number in range(len(columns))]
    widths = [max(3, *(len(line[n]) for line in [columns, *rows])) for n in range(len(columns))]
    rule = [
        "-" * w if is_left else f"{'-' * (w - 1)}:" for w, is_left in zip(widths, left, strict=True)
    ]
    lines = [
        [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ]
        for line in [columns, rule, *rows]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
