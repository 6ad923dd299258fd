"""The picture on a card: bars or a curve, as chart.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moce.runs.files import atomic

CHART = "chart.png"
MOST = 20  # bars
INCH = 0.25  # a bar


def write_bars(folder: Path, values: Mapping[str, float], label: str) -> None:
    """A bar for each value, the first MOST; label: what they measure."""
    shown = dict(list(values.items())[:MOST])
    figure = _figure(0.8 + INCH * len(shown))
    axes = figure.subplots()
    axes.barh(list(shown), list(shown.values()), color="#00796b")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _save(figure, folder)


def write_curve(folder: Path, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    """Values by the step of training."""
    figure = _figure(2.5)
    axes = figure.subplots()
    axes.plot(steps, values, color="#00796b")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    _save(figure, folder)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot, which looks for a display

    return Figure(figsize=(6, height), layout="constrained")


def _save(figure: Any, folder: Path) -> None:
    with atomic(folder / CHART) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
