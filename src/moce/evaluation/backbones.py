"""What is compared: dense backbones, and MoCE runs that hand each task a backbone of its own.

Written NAME=REFERENCE or NAME=REFERENCE@HOW. A MoCE run is customised for every task: by a strategy
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

HOWS: tuple[str, ...] = (*get_args(Strategy), "random", "oracle")
NAME = re.compile(r"\w[\w.+-]*")  # names become folders and columns


@dataclass(frozen=True)
class Contender:
    """name: as tables show it; reference: what `load_backbone` or `moce.load` takes."""

    name: str
    reference: str
    how: str | None = None


def read_contenders(texts: tuple[str, ...]) -> list[Contender]:
    """Contenders from NAME=REFERENCE[@HOW]. Raises MoceError if one is not of that form."""
    contenders = []
    for text in texts:
        name, equals, reference = text.partition("=")
        how: str | None = None
        if "@" in reference:
            reference, _, how = reference.rpartition("@")
        if not (NAME.fullmatch(name) and equals and reference):
            raise MoceError(f"backbone '{text}' is not NAME=REFERENCE or NAME=REFERENCE@HOW")
        if how is not None and how not in HOWS:
            raise MoceError(f"backbone '{text}': @{how} is none of {', '.join(HOWS)}")
        contenders.append(Contender(name, reference, how))
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise MoceError(f"two backbones have one name (names: {', '.join(names)})")
    return contenders


def open_contender(contender: Contender) -> Backbone | Bank:
    """The backbone, or the bank of a MoCE run. Raises MoceError if it is neither, or @HOW does not fit."""
    path = expand(Path(contender.reference))
    if holds_moce(path):
        return load(path)
    if contender.how is not None:
        raise MoceError(f"{contender.reference} has no experts to choose from: leave out @HOW")
    return load_backbone(contender.reference)
