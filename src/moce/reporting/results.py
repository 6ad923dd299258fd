"""Section Results: what every backbone reaches on every task."""

from __future__ import annotations

from typing import Any

import numpy as np

from moce.reporting.elements import Block, Cell, Chart, Picture, Row, Section, Table
from moce.reporting.results_table import CONTROLS, LEADING, Results, protocol_table
from moce.reporting.style import INK, SOFT, drawing, look_of

PROTOCOLS = {"linear": "Linear probe", "knn": "Nearest neighbors", "finetune": "Fine-tuned"}


def results_section(results: Results) -> Section:
    whiskers = "Whiskers: standard deviation over the draws of labels."
    blocks: list[Block] = [Chart(_figure(results), whiskers)]
    blocks += [_table(results, protocol) for protocol in results.protocols]
    lead = (
        "The metric on the test images of every task. Compare MoCE with MAE+, which had the same "
        "number of steps; the oracle shows what a perfect choice of experts would give."
    )
    return Section("results", "Results", lead, blocks)


def _table(results: Results, protocol: str) -> Table:
    columns, rows = protocol_table(results, protocol)
    backbones = results.backbones(protocol)
    cells: list[Row] = []
    for line in rows:
        best = _best(results, line, protocol)
        shown = dict(zip(backbones, line[LEADING:], strict=False))
        values = [_value_cell(text, strong=name == best) for name, text in shown.items()]
        cells.append([*line[:LEADING], *values, *line[LEADING + len(backbones) :]])
    caption = (
        f"{PROTOCOLS.get(protocol, protocol)}, in %: mean ± standard deviation over draws of labels; "
        "the best in bold, random and oracle routes aside."
    )
    if "regret" in columns:
        caption += " Regret: oracle minus MoCE, in points."
    if "strategy, vote" in columns:
        caption += " Vote: share of the task's images that vote for the winning route."
    heads = [
        "Task",
        "Labels",
        "Metric",
        *_titles(results, protocol),
        *columns[LEADING + len(backbones) :],
    ]
    return Table(caption, heads, cells, last_apart=True)


def _best(results: Results, line: list[str], protocol: str) -> str | None:
    """The backbone with the best value in a row, if several have one."""
    values = dict(zip(results.backbones(protocol), line[LEADING:], strict=False))
    controls = {r["backbone"] for r in results.of_protocol(protocol) if r["selection"] in CONTROLS}
    rivals = {b: float(v.split()[0]) for b, v in values.items() if v and b not in controls}
    return max(rivals, key=lambda name: rivals[name]) if len(rivals) > 1 else None


def _value_cell(text: str, *, strong: bool) -> Cell:
    mean, plus_minus, deviation = text.partition(" ± ")
    return Cell(mean or "–", f"± {deviation}" if plus_minus else "", strong)


def _titles(results: Results, protocol: str) -> list[str]:
    return [look.title for look in _looks(results, protocol).values()]


def _looks(results: Results, protocol: str) -> dict[str, Any]:
    rows = {row["backbone"]: row for row in results.of_protocol(protocol)}
    return {name: look_of(row, number) for number, (name, row) in enumerate(rows.items())}


def _figure(results: Results) -> Picture:
    protocols = results.protocols
    counts = [len(results.backbones(protocol)) for protocol in protocols]
    alt = f"Values of {max(counts)} backbones on {len(results.tasks)} tasks; the tables below hold them."
    with drawing(1.4 + 0.52 * len(results.tasks), alt) as canvas:
        panels = canvas.figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
        for axes, protocol in zip(panels, protocols, strict=True):
            _dots(axes, results, protocol)
        widest = panels[int(np.argmax(counts))]
        canvas.figure.legend(*widest.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return canvas.picture


def _dots(axes: Any, results: Results, protocol: str) -> None:
    """One line per task, with the backbones a little apart."""
    looks = _looks(results, protocol)
    for number, (backbone, look) in enumerate(looks.items()):
        offset = min(0.13, 0.7 / len(looks)) * (number - (len(looks) - 1) / 2)
        values = {task: results.values(task, protocol, backbone) for task in results.tasks}
        values = {task: found for task, found in values.items() if found}
        axes.errorbar(
            [100 * np.mean(found) for found in values.values()],
            [results.tasks.index(task) + offset for task in values],
            xerr=[100 * np.std(found) for found in values.values()],
            fmt=look.marker,
            color=look.color,
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            elinewidth=1.3,
            label=look.title,
        )
    count = len(results.tasks)
    axes.set_yticks(range(count), results.tasks, color=INK)
    axes.set_ylim(count - 0.5, -0.5)
    axes.hlines(
        np.arange(0.5, count - 1), 0, 1, "#eceef1", transform=axes.get_yaxis_transform(), lw=0.8
    )
    axes.grid(False, axis="y")
    axes.set_xlabel(f"{PROTOCOLS.get(protocol, protocol)}, %", color=SOFT)
