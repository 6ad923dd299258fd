"""MAE, MAE+ and MoCE side by side on one task: linear probes, a random route and the best one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from moce.customization.bank import Bank
from moce.customization.selection import Choice, Route
from moce.features import extract_features
from moce.loading import Backbone
from moce.transfer.probe import linear_predictions
from moce.transfer.task import Task, draw_labels

MOST_ROUTES = 8  # that the oracle tries
LINEAR = "linear_probe"


@dataclass
class Comparison:
    """rows: results in the demo's form, one value per draw of labels; choice: what MoCE selected."""

    task: str
    choice: Choice
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, method: str, protocol: str, values: list[float]) -> None:
        row = {"task": self.task, "method": method, "protocol": protocol}
        self.rows.append({**row, "metric": "accuracy", "values": values})


def compare_probes(
    name: str,
    task: Task,
    dense: dict[str, Backbone],
    bank: Bank,
    num_labels: int,
    draws: int,
    seed: int,
) -> Comparison:
    """Probe the dense backbones, MoCE's choice for the task's training images, and every route."""
    comparison = Comparison(name, bank.select(task.train))
    scorer = _Scorer(task, bank, num_labels, draws, seed)
    for method, backbone in dense.items():
        right = scorer.correct(backbone.vit)
        comparison.add(method, LINEAR, right.mean(axis=1).tolist())
    chosen = scorer.correct(bank.backbone(comparison.choice))
    comparison.add("moce", LINEAR, chosen.mean(axis=1).tolist())
    routes = candidate_routes(bank)
    by_route = np.stack([scorer.correct(bank.route_backbone(route)) for route in routes])
    comparison.add("random_route", LINEAR, random_route(by_route, seed))
    comparison.add("oracle", LINEAR, oracle(by_route, seed))
    return comparison


def candidate_routes(bank: Bank) -> list[Route]:
    """The routes with the most training images, at most MOST_ROUTES."""
    return list(bank.routes)[:MOST_ROUTES]


def random_route(correct: np.ndarray, seed: int) -> list[float]:
    """Accuracy of a route drawn anew for every draw of labels. correct: [routes, draws, images]."""
    generator = np.random.default_rng(seed)
    drawn = [int(generator.integers(len(correct))) for _ in range(correct.shape[1])]
    return [float(correct[route, draw].mean()) for draw, route in enumerate(drawn)]


def oracle(correct: np.ndarray, seed: int) -> list[float]:
    """Accuracy of the best route, [draws]: chosen on one half of the images, scored on the other.

    Both halves take both parts, and the two scores are averaged. Choosing and scoring on the
    same images would let the luckiest route win. correct: [routes, draws, images] bool.
    """
    order = np.random.default_rng(seed).permutation(correct.shape[2])
    halves = np.array_split(order, 2)
    accuracy = np.stack([correct[:, :, half].mean(axis=2) for half in halves])  # [2, routes, draws]
    best = accuracy.argmax(axis=1)
    draws = np.arange(correct.shape[1])
    return ((accuracy[1, best[0], draws] + accuracy[0, best[1], draws]) / 2).tolist()


class _Scorer:
    """Which test images a probe on an encoder's features gets right, for every draw of labels."""

    def __init__(self, task: Task, bank: Bank, num_labels: int, draws: int, seed: int) -> None:
        self._task = task
        self._extract: Callable[..., Any] = lambda vit, images: extract_features(
            vit, bank.encoder_spec, images, device=bank.device, precision=bank.precision
        ).numpy()
        self._draws = [
            draw_labels(task.train_labels, num_labels, seed + number) for number in range(draws)
        ]

    def correct(self, vit: VisionTransformer) -> np.ndarray:
        """[draws, test images] bool."""
        task = self._task
        train, test = self._extract(vit, task.train), self._extract(vit, task.test)
        return np.stack(
            [
                linear_predictions(train[rows], task.train_labels[rows], test) == task.test_labels
                for rows in self._draws
            ]
        )
