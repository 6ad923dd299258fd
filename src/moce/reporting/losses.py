"""Section Losses: the loss curves of all training runs."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from moce.reporting.elements import Section, html
from moce.reporting.load import Material, Run
from moce.reporting.style import METHODS, another, drawing

LABELED = ("classifier", "detector", "segmenter")
UNTRAINED = ("clusters", "headroom", "evaluation", "probe")
DASHES = ("-", "--", ":", "-.")  # for runs of the same method


def losses_section(material: Material) -> Section | None:
    """The section; None without a training run."""
    trained = [run for run in material.runs if run.kind not in UNTRAINED]
    if not trained:
        return None
    blocks = []
    logged = [run for run in trained if run.metrics]
    unlabeled = [run for run in logged if run.kind not in LABELED]
    if unlabeled:
        caption = (
            "Reconstruction error of the removed patches. MoCE's is shown without the losses of its "
            "gates, to compare with MAE+."
        )
        blocks.append(html.chart(_figure(unlabeled, "loss"), caption))
    labeled = [run for run in logged if run.kind in ("classifier", "segmenter")]
    if labeled:
        blocks.append(html.chart(_figure(labeled, "cross-entropy"), title="Fine-tuning"))
    validated = [run for run in labeled if held_out_scores(run)[0]]
    if validated:
        blocks.append(_validation_chart(validated))
    detectors = [run for run in logged if run.kind == "detector"]
    if detectors:
        blocks.append(html.chart(_figure(detectors, "sum of losses"), title="Detection"))
    silent = ", ".join(run.name for run in trained if not run.metrics)
    if silent:
        blocks.append(html.note(f"Nothing was logged by: {silent}."))
    lead = "Lower is better. Each point is a mean over steps, on augmented training images."
    return Section("losses", "Losses", lead, blocks)


def curve(run: Run) -> tuple[list[float], list[float]]:
    """(epochs, losses) as logged; for MoCE the reconstruction term."""
    name = "reconstruction" if any("reconstruction" in row for row in run.metrics) else "loss"
    rows = [row for row in run.metrics if name in row and "epoch" in row]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def held_out_scores(run: Run) -> tuple[list[float], list[float]]:
    """(epochs, scores in %) on held-out images, as logged with --keep-best."""
    rows = [row for row in run.metrics if "val" in row and "epoch" in row]
    return [row["epoch"] for row in rows], [100 * row["val"] for row in rows]


def _validation_chart(runs: list[Run]) -> Markup:
    """Scores on held-out images; the kept weights are marked: the first of the best, as in training."""
    best = []
    with drawing(2.6, "Scores on held-out images over epochs.") as canvas:
        axes = canvas.figure.subplots()
        for number, run in enumerate(runs):
            color, marker, dashes = style_of(runs, number)
            epochs, scores = held_out_scores(run)
            axes.plot(epochs, scores, dashes, color=color, marker=marker, label=run.label)
            place = scores.index(max(scores))
            axes.plot(
                epochs[place], scores[place], "o", color=color, markersize=12, fillstyle="none"
            )
            best.append(f"{run.label}: {scores[place]:.1f} % after epoch {epochs[place]:g}")
        axes.set_xlabel("epochs")
        axes.set_ylabel("%")
        axes.legend()
    caption = f"A circle marks the weights that are kept. {'; '.join(best)}."
    return html.chart(canvas.picture, caption, "Fine-tuning, held-out images")


def _figure(runs: list[Run], unit: str) -> Markup:
    """Runs that continue from an MAE have a panel of their own: their losses vary much less."""
    continued = [run for run in runs if run.config.get("mae")]
    others = [run for run in runs if run not in continued]
    panels = [shown for shown in (others, continued) if shown]
    ends = [f"{run.label} ends at {curve(run)[1][-1]:.4f}" for run in runs if curve(run)[1]]
    with drawing(3.5, f"Losses over epochs. {'; '.join(ends)}.") as canvas:
        grid = canvas.figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, shown in zip(grid, panels, strict=True):
            draw_losses(axes, shown)
        grid[0].set_ylabel(unit)
    return canvas.picture


def style_of(runs: list[Run], number: int) -> tuple[str, str, str]:
    """Color, marker and dashes of a run among others, which may be of the same kind."""
    kind = runs[number].kind
    before = sum(other.kind == kind for other in runs[:number])
    look = METHODS.get(kind, METHODS["unfinished"])
    color, marker = (look.color, ".") if before == 0 else another(before - 1)
    return color, marker, DASHES[before % len(DASHES)]


def draw_losses(axes: Any, runs: list[Run]) -> None:
    for number, run in enumerate(runs):
        color, marker, dashes = style_of(runs, number)
        axes.plot(*curve(run), dashes, color=color, marker=marker, label=run.label)
    axes.set_xlabel("epochs")
    axes.legend()
