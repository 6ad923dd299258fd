"""Section Losses: the loss curves of all training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moce.reporting.elements import Block, Chart, Note, Picture, Section
from moce.reporting.load import Material, Run
from moce.reporting.style import METHODS, drawing

UNTRAINED = ("clusters", "headroom", "evaluation")
DASHES = ("-", "--", ":", "-.")  # for runs of the same method


def losses_section(material: Material) -> Section | None:
    """The section; None without a training run."""
    trained = [run for run in material.runs if run.kind not in UNTRAINED]
    if not trained:
        return None
    blocks: list[Block] = []
    logged = [run for run in trained if run.metrics]
    unlabeled = [run for run in logged if run.kind != "classifier"]
    labeled = [run for run in logged if run.kind == "classifier"]
    if unlabeled:
        blocks.append(Chart(_reconstruction_figure(unlabeled), _caption(unlabeled)))
    if labeled:
        blocks.append(Chart(_figure(labeled, "cross-entropy"), title="Fine-tuning"))
    silent = ", ".join(run.name for run in trained if not run.metrics)
    if silent:
        blocks.append(Note(f"Nothing was logged by: {silent}."))
    lead = "Lower is better. Each point is a mean over steps, on augmented training images."
    return Section("losses", "Losses", lead, blocks)


def _caption(runs: list[Run]) -> str:
    text = "Reconstruction error of the removed patches."
    if any(run.kind == "moce" for run in runs):
        text += " MoCE's is shown without the losses of its gates, to compare with MAE+."
    return text


def curve(run: Run) -> tuple[list[float], list[float]]:
    """(epochs, losses) as logged; for MoCE the reconstruction term."""
    name = "reconstruction" if any("reconstruction" in row for row in run.metrics) else "loss"
    rows = [row for row in run.metrics if name in row and "epoch" in row]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def first_epoch(run: Run, runs: list[Run], seen: frozenset[Path] = frozenset()) -> float:
    """Epochs that a run's initial weights were trained for, as far as their run is shown."""
    parent = _parent(run, runs)
    if parent is None or parent.path in seen or not curve(parent)[0]:
        return 0.0
    return first_epoch(parent, runs, seen | {parent.path}) + curve(parent)[0][-1]


def _parent(run: Run, runs: list[Run]) -> Run | None:
    """The run that provided the initial weights: the same folder or, if moved, the same name."""
    origin = run.config.get("mae") or run.config.get("init")
    if origin is None:
        return None
    path = Path(str(origin)).resolve()
    others = [other for other in runs if other is not run and other.is_mae]
    exact = [other for other in others if other.path.resolve() == path]
    return next(iter(exact + [other for other in others if other.name == path.name]), None)


def _reconstruction_figure(runs: list[Run]) -> Picture:
    """All runs, one after the other, and a close-up of those that continue others."""
    later = [run for run in runs if first_epoch(run, runs) > 0]
    if not later or len(later) == len(runs):
        return _figure(runs, "loss")
    with drawing(3.5, _alt(runs)) as canvas:
        whole, close = canvas.figure.subplots(1, 2, width_ratios=[1.25, 1])
        _lines(whole, runs, runs, "reconstruction loss")
        whole.set_title("From the first step")
        _lines(close, later, runs, "")
        close.set_title("The continuation, close up")
    return canvas.picture


def _figure(runs: list[Run], unit: str) -> Picture:
    with drawing(3.5, _alt(runs)) as canvas:
        _lines(canvas.figure.subplots(), runs, runs, unit)
    return canvas.picture


def _lines(axes: Any, runs: list[Run], all_runs: list[Run], unit: str) -> None:
    for number, run in enumerate(runs):
        before = [other for other in runs[:number] if other.kind == run.kind]
        epochs, losses = curve(run)
        start = first_epoch(run, all_runs)
        look = METHODS.get(run.kind, METHODS["unfinished"])
        axes.plot(
            [start + epoch for epoch in epochs],
            losses,
            DASHES[len(before) % len(DASHES)],
            color=look.color,
            marker=look.marker if len(epochs) < 25 else "",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=run.label,
        )
    axes.set_xlabel("epochs")
    axes.set_ylabel(unit)
    axes.legend(loc="upper right")


def _alt(runs: list[Run]) -> str:
    ends = [f"{run.label} ends at {curve(run)[1][-1]:.4f}" for run in runs if curve(run)[1]]
    return f"Losses over epochs. {'; '.join(ends)}."
