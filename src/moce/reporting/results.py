"""Section 2: what MAE, MAE+ and MoCE reach on every task."""

from __future__ import annotations

from typing import Any

import numpy as np

from moce.reporting.elements import Block, Cell, Chart, Picture, Section, Table
from moce.reporting.images import percent
from moce.reporting.results_table import PROTOCOLS, Results
from moce.reporting.style import METHODS, SOFT, drawing, legend_above

SHORT = {"random_route": "random", "oracle": "oracle"}
RIVALS = ("mae", "mae_plus", "moce")  # among which the best is set in bold


def results_section(results: Results) -> Section:
    blocks: list[Block] = [
        Chart(_figure(results), "Whiskers: standard deviation over the draws of labels.")
    ]
    blocks.append(_table(results))
    if results.seconds:
        blocks.append(_seconds(results.seconds))
    lead = (
        "Accuracy on the test images of every task; the fair comparison is MoCE with MAE+, which "
        "had the same number of steps, and the oracle shows what a perfect choice of experts would give."
    )
    return Section("results", "Results", lead, blocks)


def _table(results: Results) -> Table:
    columns = results.columns()
    groups = [("", 3)]
    for protocol, (title, _) in PROTOCOLS.items():
        count = sum(name == protocol for name, _ in columns)
        if count:
            groups.append((title, count + (protocol == "linear_probe")))
    heads = ["Task", "Strategy", "Vote share"]
    for number, (_, method) in enumerate(columns):
        heads.append(SHORT.get(method, METHODS[method].title))
        if _regret_follows(columns, number):
            heads.append("regret")
    rows = [_row(results, task, columns) for task in results.tasks]
    rows.append(_average_row(results, columns))
    caption = (
        "Accuracy in %, mean ± standard deviation over draws; best of MAE, MAE+ and MoCE in bold. "
        "Vote share: part of the task's images that vote for the winning route. "
        "Regret: oracle less MoCE, in points."
    )
    return Table(caption, heads, rows, groups, last_apart=True)


def _regret_follows(columns: list[tuple[str, str]], number: int) -> bool:
    """Regret stands after the last column of the linear probe."""
    following = columns[number + 1][0] if number + 1 < len(columns) else ""
    return columns[number][0] == "linear_probe" and following != "linear_probe"


def _row(results: Results, task: str, columns: list[tuple[str, str]]) -> list[Cell | str]:
    choice = results.selection.get(task, {})
    share = percent(choice["share"]) if "share" in choice else "–"
    cells: list[Cell | str] = [task, str(choice.get("strategy", "–")), share]
    for number, (protocol, method) in enumerate(columns):
        best = best_method(results, task, protocol) == method
        cells.append(accuracy_cell(results.values(task, protocol, method), strong=best))
        if _regret_follows(columns, number):
            cells.append(_points(results.regret(task)))
    return cells


def best_method(results: Results, task: str, protocol: str) -> str | None:
    """The rival with the best mean on a task."""
    means = {method: results.mean(task, protocol, method) for method in RIVALS}
    known = {method: mean for method, mean in means.items() if mean is not None}
    return max(known, key=lambda method: known[method]) if len(known) > 1 else None


def accuracy_cell(values: list[float], *, strong: bool = False) -> Cell:
    """Mean ± standard deviation in %."""
    if not values:
        return Cell("–")
    spread = f"± {100 * np.std(values):.1f}" if len(values) > 1 else ""
    return Cell(f"{100 * np.mean(values):.1f}", spread, strong)


def _points(difference: float | None) -> str:
    return "–" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def _average_row(results: Results, columns: list[tuple[str, str]]) -> list[Cell | str]:
    cells: list[Cell | str] = ["average", "", ""]
    for number, (protocol, method) in enumerate(columns):
        mean = results.average(protocol, method)
        rivals = [results.average(protocol, rival) or 0.0 for rival in RIVALS]
        best = method in RIVALS and mean is not None and mean == max(rivals)
        cells.append(accuracy_cell([] if mean is None else [mean], strong=best))
        if _regret_follows(columns, number):
            regrets = [results.regret(task) for task in results.tasks]
            known = [regret for regret in regrets if regret is not None]
            cells.append(_points(float(np.mean(known)) if known else None))
    return cells


def _seconds(seconds: dict[str, float]) -> Table:
    cells = [f"{value:.1f}" for value in seconds.values()]
    row: list[Cell | str] = ["Seconds", *cells, f"{sum(seconds.values()):.1f}"]
    return Table("How long every stage took.", ["Stage", *seconds, "all"], [row])


def _figure(results: Results) -> Picture:
    protocols = list(dict.fromkeys(protocol for protocol, _ in results.columns()))
    best = {p: results.average(p, "moce") for p in protocols}
    words = ", ".join(
        f"{PROTOCOLS[p][0]} {100 * v:.1f} %" for p, v in best.items() if v is not None
    )
    alt = f"Accuracy of every method on {len(results.tasks)} tasks. MoCE on average: {words}."
    ratios = [1.6 if protocol == "linear_probe" else 1.0 for protocol in protocols]
    with drawing(1.3 + 0.52 * len(results.tasks), alt) as canvas:
        panels = canvas.figure.subplots(
            1, len(protocols), sharey=True, squeeze=False, width_ratios=ratios
        )[0]
        for axes, protocol in zip(panels, protocols, strict=True):
            _dots(axes, results, protocol)
        legend_above(panels[0], 5)
        for axes in panels[1:]:
            axes.tick_params(axis="y", length=0)
    return canvas.picture


def _dots(axes: Any, results: Results, protocol: str) -> None:
    """One line per task; the methods a little apart, each with its spread."""
    methods = [method for name, method in results.columns() if name == protocol]
    for number, method in enumerate(methods):
        offset = 0.13 * (number - (len(methods) - 1) / 2)
        shown = [task for task in results.tasks if results.values(task, protocol, method)]
        means = [100 * np.mean(results.values(task, protocol, method)) for task in shown]
        spread = [100 * np.std(results.values(task, protocol, method)) for task in shown]
        places = [results.tasks.index(task) + offset for task in shown]
        look = METHODS[method]
        axes.errorbar(
            means,
            places,
            xerr=spread,
            fmt=look.marker,
            color=look.color,
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            elinewidth=1.3,
            label=look.title,
        )
    axes.set_yticks(range(len(results.tasks)), results.tasks, color="#24262b")
    axes.set_ylim(len(results.tasks) - 0.5, -0.5)
    for edge in range(1, len(results.tasks)):
        axes.axhline(edge - 0.5, color="#eceef1", linewidth=0.8)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"{PROTOCOLS[protocol][0]}, accuracy in %", color=SOFT)
