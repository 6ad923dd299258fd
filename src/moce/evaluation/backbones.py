"""What is compared: dense backbones, and MoCE runs that hand each task a backbone of its own.

Written NAME=REFERENCE or NAME=REFERENCE@HOW. A MoCE run is customized for every task: by a strategy
of `moce customize`, by a route at `random`, by the best route there is (`oracle`), or by the labels
(`probe`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moce.config import Strategy, expand
from moce.customization.bank import Bank, load
from moce.errors import MoceError
from moce.weights.from_runs import Backbone, holds_moce, load_backbone

SELECTIONS: tuple[str, ...] = (*get_args(Strategy), "random", "oracle")
NAME = re.compile(r"\w[\w.+-]*")  # names become folders and columns


@dataclass(frozen=True)
class Candidate:
    """name: as tables show it; reference: what `load_backbone` or `moce.load` takes."""

    name: str
    reference: str
    how: str | None = None


def read_candidates(texts: tuple[str, ...]) -> list[Candidate]:
    """Contenders from NAME=REFERENCE[@HOW]. Raises MoceError if one is not of that form."""
    candidates = []
    for text in texts:
        name, equals, reference = text.partition("=")
        how: str | None = None
        if "@" in reference:
            reference, _, how = reference.rpartition("@")
        if not (NAME.fullmatch(name) and equals and reference):
            raise MoceError(f"backbone '{text}' is not NAME=REFERENCE or NAME=REFERENCE@HOW")
        if how is not None and how not in SELECTIONS:
            raise MoceError(f"backbone '{text}': @{how} is none of {', '.join(SELECTIONS)}")
        candidates.append(Candidate(name, reference, how))
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise MoceError(f"two backbones have one name (names: {', '.join(names)})")
    return candidates


def open_candidate(candidate: Candidate) -> Backbone | Bank:
    """The backbone, or the bank of a MoCE run. Raises MoceError if it is neither, or @HOW does not fit."""
    path = expand(Path(candidate.reference))
    if holds_moce(path):
        return load(path)
    if candidate.how is not None:
        raise MoceError(f"{candidate.reference} has no experts to choose from: leave out @HOW")
    return load_backbone(candidate.reference)
