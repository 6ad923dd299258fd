"""NAME=PATH@SELECTION: the backbones that an evaluation compares.

A MoCE run is customized for every task: by a strategy of `moce customize`, by a random route, by the
best route (cross-fitted) or by the labels (probe).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moce.config import Strategy, expand
from moce.customization.bank import Bank, load
from moce.errors import MoceError
from moce.evaluation.results import SELECTIONS_BEFORE
from moce.weights.from_runs import Backbone, holds_moce, load_backbone

SELECTIONS: tuple[str, ...] = (*get_args(Strategy), "random", "best_route")
NAME = re.compile(r"\w[\w.+-]*")  # names become folders and columns


@dataclass(frozen=True)
class Candidate:
    """name: as in tables; reference: a path or timm name; selection: how a MoCE run is customized."""

    name: str
    reference: str
    selection: str | None = None


def read_candidates(texts: tuple[str, ...]) -> list[Candidate]:
    """Parse NAME=PATH[@SELECTION]. Raises MoceError for another form or a name used twice."""
    candidates = [_read_candidate(text) for text in texts]
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise MoceError(f"two backbones have the same name (names: {', '.join(names)})")
    return candidates


def _read_candidate(text: str) -> Candidate:
    name, equals, reference = text.partition("=")
    selection: str | None = None
    if "@" in reference:
        reference, _, selection = reference.rpartition("@")
    if not (NAME.fullmatch(name) and equals and reference):
        raise MoceError(f"backbone '{text}' is not NAME=PATH or NAME=PATH@SELECTION")
    selection = SELECTIONS_BEFORE.get(selection or "", selection)
    if selection is not None and selection not in SELECTIONS:
        raise MoceError(f"backbone '{text}': @{selection} is not one of {', '.join(SELECTIONS)}")
    return Candidate(name, reference, selection)


def open_candidate(candidate: Candidate) -> Backbone | Bank:
    """Load the backbone, or the bank of a MoCE run.

    Raises MoceError if the path holds neither, or a dense backbone has a selection.
    """
    path = expand(Path(candidate.reference))
    if holds_moce(path):
        return load(path)
    if candidate.selection is not None:
        raise MoceError(f"{candidate.reference} has no experts to select: leave out @SELECTION")
    return load_backbone(candidate.reference)
