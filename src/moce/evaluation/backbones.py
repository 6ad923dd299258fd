"""NAME=PATH@SELECTION: the backbones that an evaluation compares.

A MoCE run is customized for every task: by a strategy of `moce customize`, by a random route, by the
best route (cross-fitted) or by the labels (probe). `@adapt` and `@STRATEGY+adapt` continue masked
autoencoding on the task's training images, from any masked autoencoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moce.config import FileSettings, Strategy, expand
from moce.customization.bank import Bank, load
from moce.errors import MoceError
from moce.evaluation.results import SELECTIONS_BEFORE
from moce.models.encoder import input_shape
from moce.models.mae import MAE, MAESpec
from moce.weights.from_runs import Backbone, holds_moce, load_backbone
from moce.weights.resolve import moce_run, start_from

# Selections without a single backbone.
PROBE_ONLY = frozenset({"random", "best_route", "best_strategy", "probe"})
ADAPT = "adapt"
SELECTIONS: tuple[str, ...] = (
    *get_args(Strategy),
    *("random", "best_route", "best_strategy", ADAPT),
    *(f"{strategy}+{ADAPT}" for strategy in get_args(Strategy) if strategy not in PROBE_ONLY),
)
NAME = re.compile(r"\w[\w.+-]*")  # names become folders and columns


@dataclass(frozen=True)
class Candidate:
    """name: as in tables; reference: a path or timm name; selection: what it becomes for a task."""

    name: str
    reference: str
    selection: str | None = None

    @property
    def adapts(self) -> bool:
        """Whether the backbone is adapted to each task."""
        return self.selection is not None and self.selection.split("+")[-1] == ADAPT

    @property
    def strategy(self) -> str | None:
        """How a MoCE run is customized, before any adaptation; None: as by default."""
        strategy, _, _ = (self.selection or "").removesuffix(ADAPT).partition("+")
        return strategy or None


@dataclass
class MaskedAutoencoder:
    """A masked autoencoder that is to be adapted to tasks."""

    spec: MAESpec
    mae: MAE


Opened = Backbone | Bank | MaskedAutoencoder


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


def open_candidate(candidate: Candidate) -> Opened:
    """Load the backbone, the bank of a MoCE run, or what is to be adapted without experts.

    Raises MoceError if the path holds neither, or a dense backbone has a strategy.
    """
    path = expand(Path(candidate.reference))
    is_run = moce_run(path) is not None
    if (is_run or not candidate.adapts) and holds_moce(path):
        return load(path)
    if candidate.strategy is not None:
        instead = f"give @{ADAPT}" if candidate.adapts else "leave out @SELECTION"
        raise MoceError(f"{candidate.reference} has no experts to select: {instead}")
    if candidate.adapts:
        return MaskedAutoencoder(*start_from(candidate.reference, FileSettings()))
    return load_backbone(candidate.reference)


def task_shape(model: Opened) -> tuple[int, int, int]:
    """Channels, height and width of a task's images."""
    if isinstance(model, Bank):
        return model.task_shape
    return input_shape(model.mae.encoder if isinstance(model, MaskedAutoencoder) else model.vit)
