"""Gains between backbones: paired differences in points, with bootstrap intervals.

A *cell* is one task with one seed of pre-training; it holds a value per draw of labels. Draws are the
same for all backbones, so values are subtracted draw by draw before anything is averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
Cells = dict[tuple[str, int], list[float]]  # by task and seed, a value per draw of labels

RESAMPLES, SEED = 10_000, 32
LIMITS = (2.5, 97.5)  # percentiles of a 95 % interval
REGRET = ("moce_oracle", "moce")  # what the best route gains over the chosen one


@dataclass(frozen=True)
class Gain:
    """A mean difference in points with its 95 % interval, and the data behind it.

    tasks, seeds: how many; draws: of labels, the maximum of all cells; unpaired: values that only one
    of the two backbones has, which are left out.
    """

    mean: float
    low: float
    high: float
    tasks: int
    seeds: int
    draws: int
    unpaired: int


def gain(
    rows: Iterable[Row],
    method: str,
    opponent: str,
    protocol: str,
    tasks: Collection[str],
    fixed_tasks: bool = False,
) -> Gain | None:
    """How much better `method` is than `opponent`, in points, averaged over tasks.

    None if no cell has both. The rows must be of one variant; see `compare` for the interval.
    """
    rows = list(rows)
    ours, theirs = (cells(rows, backbone, protocol) for backbone in (method, opponent))
    return compare(ours, theirs, tasks, fixed_tasks)


def task_gains(
    rows: Iterable[Row], method: str, opponent: str, protocol: str, tasks: Iterable[str]
) -> dict[str, Gain]:
    """The gain on every task that has both; the interval is over seeds and draws."""
    rows = list(rows)
    gains = {task: gain(rows, method, opponent, protocol, (task,)) for task in tasks}
    return {task: found for task, found in gains.items() if found}


def cells(rows: Iterable[Row], backbone: str, protocol: str) -> Cells:
    """The values of one backbone."""
    return {
        (row["task"], row["seed"]): row["values"]
        for row in rows
        if row.get("protocol") == protocol and row["backbone"] == backbone
    }


def compare(
    ours: Cells, theirs: Cells, tasks: Collection[str], fixed_tasks: bool = False
) -> Gain | None:
    """The mean over tasks of the mean over seeds of the mean over draws of `ours` less `theirs`.

    The interval is a percentile bootstrap on three levels, each resampled with replacement: tasks;
    seeds, once for all tasks, which share a pre-training; and draws of labels within each cell.
    `fixed_tasks` leaves out the first level, so the interval is for exactly these tasks, which were
    not chosen at random. Few seeds make both intervals too narrow; a single seed says nothing about
    another pre-training.
    """
    either = {cell for cell in ours.keys() | theirs.keys() if cell[0] in tasks}
    both = either & ours.keys() & theirs.keys()
    if not both:
        return None
    table = paired(ours, theirs, both)
    means = resampled_means(table, fixed_tasks, np.random.default_rng(SEED))
    low, high = np.nanpercentile(means, LIMITS)
    return Gain(
        mean=float(mean_of_means(table)),
        low=float(low),
        high=float(high),
        tasks=table.shape[0],
        seeds=table.shape[1],
        draws=table.shape[2],
        unpaired=sum(abs(len(ours.get(c, ())) - len(theirs.get(c, ()))) for c in either),
    )


def paired(ours: Cells, theirs: Cells, both: Collection[tuple[str, int]]) -> np.ndarray:
    """Differences in points, [tasks, seeds, draws] float64, NaN where there is none."""
    tasks, seeds = sorted({task for task, _ in both}), sorted({seed for _, seed in both})
    # Draws are numbered alike, so the shorter list holds the draws that both have.
    differences = {
        cell: [100 * (a - b) for a, b in zip(ours[cell], theirs[cell], strict=False)]
        for cell in both
    }
    table = np.full((len(tasks), len(seeds), max(map(len, differences.values()))), np.nan)
    for (task, seed), points in differences.items():
        table[tasks.index(task), seeds.index(seed), : len(points)] = points
    return table


def resampled_means(
    table: np.ndarray, fixed_tasks: bool, generator: np.random.Generator
) -> np.ndarray:
    """The mean of RESAMPLES tables drawn as `compare` says from [tasks, seeds, draws]."""
    tasks, seeds, draws = table.shape
    known = (~np.isnan(table)).sum(axis=2)
    task = np.broadcast_to(np.arange(tasks), (RESAMPLES, tasks))
    if not fixed_tasks:
        task = generator.integers(tasks, size=(RESAMPLES, tasks))
    task = task[:, :, None]
    seed = generator.integers(seeds, size=(RESAMPLES, 1, seeds))
    count = known[task, seed][..., None]  # draws of the chosen cell: as many are resampled
    draw = (generator.random((RESAMPLES, tasks, seeds, draws)) * count).astype(np.intp)
    values = table[task[..., None], seed[..., None], draw]
    return mean_of_means(np.where(np.arange(draws) < count, values, np.nan))


def mean_of_means(values: np.ndarray) -> np.ndarray:
    """Mean of [..., tasks, seeds, draws] over draws, then seeds, then tasks; NaN is ignored."""
    for _ in ("draws", "seeds", "tasks"):
        with np.errstate(invalid="ignore"):  # all NaN: 0 / 0 is NaN, as intended
            values = np.nansum(values, axis=-1) / (~np.isnan(values)).sum(axis=-1)
    return values


def spread(values: Collection[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) over seeds; None for the deviation of a single seed."""
    array = np.array(list(values), dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None
