"""The figures of Mix-32, and the rows, names and looks that they share with the tables.

Every `draw_` function draws one figure from computed values and returns the Markdown that shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.mix32.parts import TASKS_OF
from experiments.mix32.stats import Gain, Row
from moce.reporting.style import INK, METHODS, SOFT, Look, drawing

PROTOCOLS = {"linear": "linear probe", "knn": "nearest neighbors", "finetune": "fine-tuned"}
# Backbones in the order of tables; others follow by name.
LOOKS = {
    "mae": METHODS["mae"],
    "mae_plus": METHODS["mae_plus"],
    "mae_further": Look("MAE+, further", "#7fb3d9", "s"),
    "mae_plus_adapted": Look("MAE+ adapted", "#003f66", "s"),
    "token_moe": Look("token MoE", "#e69f00", "v"),
    "sdr": Look("SDR", "#56b4e9", "o"),
    "moce": METHODS["moce"],
    "moce_adapted": Look("MoCE adapted", "#7a2f00", "D"),
    "moce_block": Look("MoCE, whole blocks", "#8c3b00", "D"),
    "moce_probe": Look("MoCE by labels", "#f0e442", "d"),
    "moce_route": Look("MoCE, winning route", "#cc6677", "v"),
    "moce_merge": Look("MoCE, merged by votes", "#44aa99", "<"),
    "moce_generalist": Look("MoCE, all experts averaged", "#a0522d", "X"),
    "moce_random": METHODS["random_route"],
    "moce_oracle": METHODS["best_route"],
    "moce_block_oracle": Look("best route, whole blocks", "#005f45", "^"),
    "moce_best": Look("best strategy, cross-fitted", "#117733", "^"),
    "subset": Look("subset", INK, "P"),
}


# Studies with one variant and the same seeds, which compare methods.
COMPARISON = ("main", "adapted", "finetuning", "baselines")


@dataclass(frozen=True)
class Results:
    """All rows of one recipe. name: of the recipe; figures: output folder."""

    name: str
    rows: list[Row] = field(repr=False)
    figures: Path

    def of(self, study: str) -> list[Row]:
        """Accuracies of a study."""
        return [row for row in self.rows if row["study"] == study and "protocol" in row]

    def main(self) -> list[Row]:
        """Accuracies of the comparison, with all subsets as one backbone."""
        rows = [row for study in COMPARISON for row in self.of(study)]
        return as_one_subset([row for row in rows if row["variant"] == "default"])

    def measures(self, measure: str) -> list[Row]:
        """Rows of a measure of the comparison."""
        return [
            row
            for row in self.rows
            if row["study"] in COMPARISON
            and row["variant"] == "default"
            and row.get("measure") == measure
        ]

    @contextmanager
    def figure(self, kind: str, height: float, alt: str) -> Iterator[Figure]:
        """A figure in the project's style, saved when drawn."""
        self.figures.mkdir(parents=True, exist_ok=True)
        with drawing(height, alt) as canvas:
            yield canvas.figure
            canvas.figure.savefig(self.figures / self._file(kind), dpi=130, facecolor="white")

    def shown(self, kind: str, alt: str) -> str:
        """The Markdown that shows a figure on a page beside the folder."""
        return f"![{alt}]({self.figures.name}/{self._file(kind)})"

    def _file(self, kind: str) -> str:
        return f"mix32_{self.name}_{kind}.png"

    def caption(self, study: str, rows: list[Row]) -> str:
        """Where a table's numbers come from."""
        seeds = {row["seed"] for row in rows}
        draws = {len(row["values"]) for row in rows if "values" in row}
        studies = COMPARISON if study == "main" else (study,)
        found = [row for study in studies for row in self.of(study) if row["seed"] in seeds]
        revisions = {str(row["revision"]) for row in found}
        named = [study for study in studies if any(row["study"] == study for row in found)]
        parts = [f"Seeds {listed(seeds)}"]
        parts += [f"draws of labels: {listed(draws)}"] if draws else []
        command = f"experiments.mix32.run --recipe experiments/mix32/{self.name}.yaml"
        parts += [f"revision {listed(revisions) or 'unknown'}"]
        return f"{'; '.join(parts)}; `python -m {command} --studies {' '.join(named)}`."


def tasks_of(part: str) -> tuple[str, ...]:
    return TASKS_OF.get(part, (part,))


def as_one_subset(rows: list[Row]) -> list[Row]:
    """Rename the backbones `subset_X` to `subset`, and keep only the tasks of X for them."""
    kept = []
    for row in rows:
        name, _, part = row["backbone"].partition("_")
        if name != "subset":
            kept.append(row)
        elif row["task"] in tasks_of(part):
            kept.append(row | {"backbone": "subset"})
    return kept


# Names and their order


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(values)))


def title(backbone: str) -> str:
    return LOOKS[backbone].title if backbone in LOOKS else backbone.replace("_", " ")


def look(backbone: str) -> Look:
    return LOOKS.get(backbone, Look(title(backbone), SOFT, "o"))


def ordered(backbones: Iterable[str]) -> list[str]:
    known = list(LOOKS)
    return sorted(
        set(backbones), key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def present(rows: list[Row], name: str) -> list[Any]:
    """The values of a field, in the order of their first row."""
    return list(dict.fromkeys(row[name] for row in rows))


def protocols(rows: list[Row]) -> list[str]:
    found = present(rows, "protocol")
    return [name for name in PROTOCOLS if name in found]


def by_number(variant: str) -> list[tuple[str, float, str]]:
    """A sort key for a=8,b=2: by name, then by number; texts come last."""
    pairs = [setting.partition("=")[::2] for setting in variant.split(",")]
    return [(name, as_number(value), value) for name, value in pairs]


def as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


# The figures


def draw_gains(
    results: Results,
    gains: dict[str, dict[str, Gain]],
    tasks: list[str],
    protocol: str,
    intervals: str,
) -> str:
    """A dot and an interval per task and method; gains: by method and task."""
    alt = f"Gain over MAE+, task by task, {PROTOCOLS[protocol]}"
    kind = f"gains_{protocol}"
    with results.figure(kind, 0.42 * len(tasks) + 1.1, alt) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1)
        for place, (method, of_method) in enumerate(gains.items()):
            heights = [tasks.index(task) + 0.18 * (place - 1.5) for task in of_method]
            points = np.array(
                [[g.mean, g.mean - g.low, g.high - g.mean] for g in of_method.values()]
            )
            if len(points):
                axes.errorbar(
                    points[:, 0],
                    heights,
                    xerr=np.maximum(points[:, 1:].T, 0),  # the mean may be outside
                    fmt=look(method).marker,
                    color=look(method).color,
                    label=look(method).title,
                    linewidth=1.4,
                    markersize=5,
                )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        axes.set_xlabel(f"points over MAE+, {PROTOCOLS[protocol]}{intervals}")
        figure.legend(loc="outside upper left", ncols=len(gains))
    return results.shown(kind, alt)


def draw_votes(results: Results, shares: dict[str, dict[str, float]], alt: str) -> str:
    """shares: by task and route, 0..1."""
    routes = sorted({route for of_task in shares.values() for route in of_task})
    values = [[of_task.get(route, np.nan) for route in routes] for of_task in shares.values()]
    with results.figure("votes", 0.34 * len(shares) + 1.2, alt) as figure:
        percent = 100 * np.array(values)
        axes = heat(figure, percent, list(shares), routes, "Blues", (0, 100), ".0f")
        axes.set_xlabel("route: an expert in each MoE block; % of the task's images")
    return results.shown("votes", alt)


def draw_map(
    results: Results,
    gains: dict[tuple[str, str], Gain | None],
    lines: list[str],
    variants: list[str],
    protocol: str,
) -> str:
    """gains: by line and variant."""
    found = [[gains[line, variant] for variant in variants] for line in lines]
    values = np.array([[cell.mean if cell else np.nan for cell in line] for line in found])
    most = max(1.0, float(np.nanmax(abs(values))))
    alt = f"Gain in points of training on a part of the images only, {PROTOCOLS[protocol]}"
    kind = f"map_{protocol}"
    with results.figure(kind, 0.34 * len(lines) + 1.2, alt) as figure:
        columns = [variant.replace(",", "\n") for variant in variants]
        axes = heat(figure, values, lines, columns, "RdBu", (-most, most), "+z.1f")
        axes.set_title("Points gained by training on one part only")
    return results.shown(kind, alt)


def draw_cost(
    results: Results, backbones: list[str], panels: dict[str, dict[str, list[float]]]
) -> str:
    """panels: by name, values of several seeds by backbone."""
    alt = "Training time and parameters relative to MAE+"
    with results.figure("cost", 0.34 * len(backbones) + 0.9, alt) as figure:
        plots = figure.subplots(1, len(panels), sharey=True)
        for axes, (name, values) in zip(plots, panels.items(), strict=True):
            widths = [float(np.mean(values[b])) if b in values else 0 for b in backbones]
            places = range(len(backbones))
            axes.barh(places, widths, height=0.6, color=[look(b).color for b in backbones])
            axes.axvline(1, color=INK, linewidth=1)
            axes.set_yticks(places, [title(b) for b in backbones])
            axes.set_title(f"{name}, MAE+ = 1")
        plots[0].invert_yaxis()
    return results.shown("cost", alt)


def heat(
    figure: Figure,
    values: np.ndarray,
    rows: list[str],
    columns: list[str],
    colors: str,
    limits: tuple[float, float],
    form: str,
) -> Axes:
    """A heat map with its numbers, [rows, columns]; NaN stays blank."""
    axes = figure.add_subplot()
    palette, scale = matplotlib.colormaps[colors], Normalize(*limits)
    axes.imshow(values, cmap=palette, norm=scale, aspect="auto")
    axes.grid(False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = palette(scale(value))
            ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "#ffffff"
            text = format(value, form)
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5)
    return axes
