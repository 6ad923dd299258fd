"""Which images learn and which are only scored: one rule for every command.

Images of the split test are scored; if none of them has a label, those of the split val; if none of
these either, a fifth of each class. No model learns from images that are scored: pretrain, cluster,
train and headroom leave out the splits test and, without it, val; customize also the fifth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moce.data.readers.sample import Label
from moce.data.readers.splits import scored_split
from moce.errors import MoceError
from moce.runtime.progress import log

TEST_SHARE = 0.2  # of a labeled source without splits
LEARNING = frozenset({None, "train", "val"})  # splits whose labels a model may learn
NEVER_SCORED = "no model learns from images that are scored"


@dataclass(frozen=True)
class Division:
    """parts: "train", "test", or None for an image that takes no part. rule: which ones are scored."""

    parts: list[str | None]
    rule: str


def divide(labels: Sequence[Label | None], splits: Sequence[str | None]) -> Division:
    """Divide the images of a task. Images without a label take no part.

    Raises MoceError if there are no training or no test images.
    """
    scored = _scored(labels, splits)
    if scored is None:
        return _hold_out(labels, splits)
    part_of = dict.fromkeys(LEARNING, "train") | {scored: "test"}
    parts = [
        None if label is None else part_of.get(split)
        for label, split in zip(labels, splits, strict=True)
    ]
    if "train" not in parts:
        raise MoceError("no train images: there must be both a train/ and a test/ folder")
    why = "" if scored == "test" else f", as there is no {_test(splits)}"
    return Division(parts, f"the split {scored}{why}")


def _scored(labels: Sequence[Label | None], splits: Sequence[str | None]) -> str | None:
    """The split that is scored: that of labeled images, if there are any."""
    named = {split for split, label in zip(splits, labels, strict=True) if label is not None}
    return scored_split(named or splits)


def _test(splits: Sequence[str | None]) -> str:
    return "label in test/" if "test" in splits else "test/"


def _hold_out(labels: Sequence[Label | None], splits: Sequence[str | None]) -> Division:
    """The last fifth of each class, in a fixed shuffled order, is the test set.

    Images with several classes are split without regard to them.
    """
    usable = [
        row
        for row, (label, split) in enumerate(zip(labels, splits, strict=True))
        if label is not None and split in LEARNING
    ]
    several = any(isinstance(labels[row], tuple) for row in usable)
    parts: list[str | None] = [None] * len(labels)
    rows_of: dict[Label | None, list[int]] = {}
    for place in np.random.default_rng(0).permutation(len(usable)).tolist():
        row = usable[place]
        rows_of.setdefault(None if several else labels[row], []).append(row)
    for label, rows in rows_of.items():
        if len(rows) < 2:
            kind = "the task" if several else f"class '{label}'"
            raise MoceError(f"{kind} has one image; give at least two, or a test/ folder")
        held = max(1, round(TEST_SHARE * len(rows)))
        for number, row in enumerate(rows):
            parts[row] = "train" if number < len(rows) - held else "test"
    of = "the images" if several else "each class"
    return Division(parts, f"a fifth of {of}, as there is no {_test(splits)}")


# --- for commands that learn ------------------------------------------------------------------------


def learned(
    labels: Sequence[Label | None], splits: Sequence[str | None]
) -> tuple[np.ndarray, Counter[str]]:
    """The rows that a model may learn from, [m] int64, and how many images of which splits it may not.

    It never learns from the split test, nor from the one that is scored.
    """
    kept_apart = {"test", _scored(labels, splits) or "test"}
    left = Counter(split for split in splits if split in kept_apart)
    if not left:
        return np.arange(len(splits)), left
    learns = (split not in kept_apart for split in splits)
    return np.flatnonzero(np.fromiter(learns, np.bool_, len(splits))), left


def learning_rows(
    labels: Sequence[Label | None], splits: Sequence[str | None], where: str
) -> np.ndarray:
    """The rows that a model may learn from, [m] int64: all but the split that is scored; says so.

    Raises MoceError, which names `where`, if there are none.
    """
    rows, left = learned(labels, splits)
    if not len(rows):
        names = " and ".join(map(str, left))
        raise MoceError(
            f"{where} has {names} images only, and {NEVER_SCORED}; to use them all the same, name "
            "their folder itself"
        )
    for split, count in left.items():
        log(f"{where}: left out: {count} {split} images ({NEVER_SCORED})")
    return rows


def voting_rows(
    labels: Sequence[Label | None], splits: Sequence[str | None], where: str
) -> np.ndarray:
    """The rows that customize a backbone: those that probe, finetune and evaluate do not score.

    Says how many. Raises MoceError as `learning_rows`.
    """
    rows = learning_rows(labels, splits, where)
    if _scored(labels, splits) is None:
        try:
            division = _hold_out(labels, splits)
        except MoceError:  # no task: nothing is going to be scored
            return rows
        held = division.parts.count("test")
        votes = (division.parts[row] != "test" for row in rows.tolist())
        rows = rows[np.fromiter(votes, np.bool_, len(rows))]
        if held:
            log(f"{where}: {held} test images take no part: {division.rule}")
    if len(rows) < len(splits):
        log(f"{where}: {len(rows)} of {len(splits)} images take part")
    return rows
