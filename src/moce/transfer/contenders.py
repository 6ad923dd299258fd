"""What is compared: dense backbones, and MoCE runs that hand each task a backbone of its own.

Written NAME=REFERENCE or NAME=REFERENCE@HOW. A MoCE run is customised for every task: by a strategy
of `moce customize`, by a route at `random`, by the best route there is (`oracle`), or by the labels
(`probe`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from moce.config import Strategy, expand
from moce.customization.bank import Bank, load
from moce.customization.selection import Route
from moce.errors import MoceError
from moce.loading import Backbone, holds_moce, load_backbone

HOWS: tuple[str, ...] = (*get_args(Strategy), "random", "oracle")
NAME = re.compile(r"\w[\w.+-]*")  # names become folders and columns
FEWEST_TO_HALVE = 4  # test images
MOST_ROUTES = 8  # that the oracle tries and a random one is drawn from


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


def candidate_routes(bank: Bank) -> list[Route]:
    """The routes with the most training images, at most MOST_ROUTES."""
    return [route for route, images in bank.routes.items() if images][:MOST_ROUTES]


def random_routes(bank: Bank, draws: int, seed: int, task: str) -> list[Route]:
    """A route drawn anew for every task and draw of labels."""
    routes = candidate_routes(bank)
    generator = np.random.default_rng([seed, *task.encode()])
    return [routes[int(generator.integers(len(routes)))] for _ in range(draws)]


def oracle_values(
    scores: list[list[np.ndarray]],
    metric: Callable[[np.ndarray, np.ndarray], float],
    labels: np.ndarray,
    seed: int,
) -> list[float]:
    """The metric of the best route, [draws]: chosen on one half of the test images, scored on the other.

    Both halves take both parts, and the two values are averaged. Choosing and scoring on the same
    images would let the luckiest route win. scores: [routes][draws] of [m, C] each; metric: from
    scores and labels to a value; labels: of the m test images. Raises MoceError if they are too few.
    """
    if len(labels) < FEWEST_TO_HALVE:
        raise MoceError(f"an oracle needs {FEWEST_TO_HALVE} test images or more, not {len(labels)}")
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:  # both halves get their part of every class
        order = order[np.argsort(labels[order], kind="stable")]
    halves = order[::2], order[1::2]
    values = np.array(
        [[[metric(of[half], labels[half]) for of in route] for route in scores] for half in halves]
    )  # [2, routes, draws]
    best = values.argmax(axis=1)
    draws = np.arange(values.shape[2])
    return ((values[1, best[0], draws] + values[0, best[1], draws]) / 2).tolist()
