"""Section While training: scores on labeled tasks, rank of the features, reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from moce.reporting.elements import Section, html
from moce.reporting.images import LOSSLESS_UP_TO, webp
from moce.reporting.load import Material, Run
from moce.reporting.losses import style_of
from moce.reporting.style import drawing
from moce.training.metrics import picture_steps

TITLES = {"knn": "k-NN", "linear": "Linear probe"}
LEAD = (
    "Measured every so many steps: the frozen encoder on the test images of labeled tasks, and the "
    "effective rank of its features of training images (RankMe), which needs no labels. A mixture is "
    "scored by the backbone that it would give the task."
)
PANEL = 2.4  # inches high


def monitoring_section(material: Material) -> Section | None:
    """The section; None if nothing was measured."""
    runs = [run for run in material.runs if any("rankme" in row for row in run.metrics)]
    if not runs:
        return None
    tasks = dict.fromkeys(name for run in runs for row in run.metrics for name in _tasks(row))
    blocks = [_scores_chart(runs, task) for task in tasks]
    blocks.append(_rank_chart(runs))
    blocks += [gallery for run in runs if (gallery := _gallery(run)) is not None]
    return Section("monitoring", "While training", LEAD, blocks)


def _tasks(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    return row.get("monitor") or {}


def _scores_chart(runs: list[Run], task: str) -> Markup:
    """Both probes of a task, in % over the epochs, a line for each run."""
    shown = [run for run in runs if any(task in _tasks(row) for row in run.metrics)]
    ends = []
    with drawing(PANEL, f"Scores on {task} over epochs.") as canvas:
        panels = canvas.figure.subplots(1, len(TITLES), sharey=True)
        for axes, (kind, title) in zip(panels, TITLES.items(), strict=True):
            value = lambda row, kind=kind: 100 * _tasks(row)[task][kind]  # noqa: E731
            _draw(axes, shown, lambda row: task in _tasks(row), value)
            axes.set_title(title)
        panels[0].set_ylabel("%")
        panels[0].legend()
    for run in shown:
        found = [_tasks(row)[task] for row in run.metrics if task in _tasks(row)]
        ends.append(
            f"{run.label}: k-NN {100 * found[-1]['knn']:.1f} %, linear "
            f"{100 * found[-1]['linear']:.1f} %, at most "
            f"{100 * max(values['linear'] for values in found):.1f} %"
        )
    return html.chart(canvas.picture, f"At the end, {'; '.join(ends)}.", f"Task {task}")


def _rank_chart(runs: list[Run]) -> Markup:
    ends = [
        f"{run.label}: {[row['rankme'] for row in run.metrics if 'rankme' in row][-1]:.1f}"
        for run in runs
    ]
    with drawing(PANEL, f"RankMe over epochs. At the end, {'; '.join(ends)}.") as canvas:
        axes = canvas.figure.subplots()
        _draw(axes, runs, lambda row: "rankme" in row, lambda row: row["rankme"])
        axes.legend()
    caption = (
        "exp of the entropy of the features' singular values (arXiv 2210.02885). It compares runs of "
        "one architecture on the same images; a fall to few dimensions is a collapse."
    )
    return html.chart(canvas.picture, caption, "Rank of the features")


def _draw(
    axes: Any,
    runs: list[Run],
    has: Callable[[dict[str, Any]], bool],
    value: Callable[[dict[str, Any]], float],
) -> None:
    for number, run in enumerate(runs):
        rows = [row for row in run.metrics if has(row) and "epoch" in row]
        color, marker, dashes = style_of(runs, number)
        points = [row["epoch"] for row in rows], [value(row) for row in rows]
        axes.plot(*points, dashes, color=color, marker=marker, label=run.label)
    axes.set_xlabel("epochs")


def _gallery(run: Run) -> Markup | None:
    """The first picture, one from the middle, and the last; None without pictures that can be read."""
    steps = picture_steps(run.path)
    if not steps:
        return None
    known = list(steps)
    items = []
    for step in dict.fromkeys((known[0], known[len(known) // 2], known[-1])):
        items.append((f"Step {step:,}", "input, masked, filled in", _picture(run, steps[step])))
    return html.gallery(items, f"Reconstructions of {run.label} while it trained")


def _picture(run: Run, path: Path) -> Markup | None:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError:
        return None
    alt = f"Images masked and filled in by {run.label} at {path.stem.replace('_', ' ')}"
    return webp(picture, alt, lossless=picture.height // 3 <= LOSSLESS_UP_TO)
