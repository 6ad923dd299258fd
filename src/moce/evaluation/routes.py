"""Random routes, and the best one: what a choice of experts is worth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moce.customization.bank import Bank
from moce.customization.selection import Route
from moce.errors import MoceError

FEWEST_TO_HALVE = 4  # test images
MOST_ROUTES = 8  # candidates for the best and for random routes


def candidate_routes(bank: Bank) -> list[Route]:
    """The routes with the most training images, at most MOST_ROUTES."""
    return [route for route, images in bank.routes.items() if images][:MOST_ROUTES]


def random_routes(bank: Bank, draws: int, seed: int, task: str) -> list[Route]:
    """A random route for every draw of labels; seeded by the task, too."""
    routes = candidate_routes(bank)
    generator = np.random.default_rng([seed, *task.encode()])
    return [routes[int(generator.integers(len(routes)))] for _ in range(draws)]


def best_values(
    scores: list[list[np.ndarray]],
    metric: Callable[[np.ndarray, np.ndarray], float],
    labels: np.ndarray,
    seed: int,
) -> list[float]:
    """The metric of the best of several backbones, [draws], cross-fitted.

    Chosen on one half of the test images and scored on the other; the mean of both ways round.
    Choosing and scoring on the same images would let the luckiest one win. scores:
    [backbones][draws] of [m, C] each; metric: from scores and labels to a value; labels: of the m test
    images. Raises MoceError if there are too few test images.
    """
    if len(labels) < FEWEST_TO_HALVE:
        raise MoceError(
            f"the best of several needs at least {FEWEST_TO_HALVE} test images, not {len(labels)}"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:  # stratify the halves by class
        order = order[np.argsort(labels[order], kind="stable")]
    halves = order[::2], order[1::2]
    values = np.array(
        [[[metric(of[half], labels[half]) for of in draws] for draws in scores] for half in halves]
    )  # [2, backbones, draws]
    best = values.argmax(axis=1)
    draws = np.arange(values.shape[2])
    return ((values[1, best[0], draws] + values[0, best[1], draws]) / 2).tolist()
