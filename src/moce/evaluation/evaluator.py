"""One contender on one task: a value per draw of labels, and how the task's backbone was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moce.config import ProbeSettings
from moce.customization.bank import Bank
from moce.customization.selection import Choice, Route
from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.evaluation.metrics import confusion_counts, score
from moce.evaluation.probe import Probe
from moce.evaluation.routes import candidate_routes, oracle_values, random_routes
from moce.evaluation.sklearn_probe import cross_validated
from moce.evaluation.task import Task, draw_labels
from moce.inference.features import extract_features
from moce.weights.from_runs import Backbone


class TooFewLabels(MoceError):
    """Candidates cannot be compared by cross-validation."""


@dataclass
class Outcome:
    """values: the metric, 0..1, per draw; confusion: summed over the draws; choice: of a MoCE run."""

    values: list[float]
    confusion: list[list[int]] | None = None
    choice: dict[str, Any] | None = None


class Evaluator:
    """A task with its draws of labels; every contender is probed on the same ones."""

    def __init__(
        self,
        task: Task,
        metric: str,
        settings: ProbeSettings,
        device: torch.device,
        precision: str,
    ) -> None:
        self.task, self.metric, self.settings = task, metric, settings
        self.device, self.precision = device, precision
        self.draws = [
            draw_labels(task.train_labels, settings.num_labels, settings.seed, number)
            for number in range(settings.draws)
        ]
        # By MoCE run and route, for all draws: strategies, random routes and the oracle share them.
        self._of_routes: dict[tuple[str, Route], list[np.ndarray]] = {}

    def probe(
        self, candidate: Backbone | Bank, how: str | None = None, reference: str = ""
    ) -> Outcome:
        """The contender's outcome; how: a strategy, random, oracle or probe, for a bank.

        reference: names the bank, so that its routes are probed once for all ways to choose.
        """
        if isinstance(candidate, Backbone):
            return self._outcome(self._scores(candidate, self._all))
        if how == "random":
            return self._random(candidate, reference)
        if how == "oracle":
            return self._oracle(candidate, reference)
        if how == "probe":
            return self._by_labels(candidate)
        choice = candidate.select(self.task.train, how or "auto")
        if choice.strategy == "route" and candidate.model.gate_scale == "straight_through":
            scores = self._route_scores(candidate, reference, choice.route)
        else:  # a merge is of the task's own, and so is the scale of a route under prob
            scores = self._scores(as_backbone(candidate, choice), self._all)
        return self._outcome(scores, choice.to_json())

    def _route_scores(self, bank: Bank, reference: str, route: Route) -> list[np.ndarray]:
        """Scores [m, C] for every draw, of the dense backbone of a route."""
        key = reference, route
        if key not in self._of_routes:
            backbone = as_backbone(bank, bank.route_choice(route))
            self._of_routes[key] = self._scores(backbone, self._all)
        return self._of_routes[key]

    @property
    def _all(self) -> list[int]:
        return list(range(len(self.draws)))

    def _scores(self, backbone: Backbone, numbers: list[int]) -> list[np.ndarray]:
        """Scores [m, C] of the test images for these draws."""
        probe = Probe(backbone, self.task, self.settings, self.device, self.precision)
        classify = probe.classifier()
        return [classify(self.draws[number], number) for number in numbers]

    def _outcome(self, scores: list[np.ndarray], choice: dict[str, Any] | None = None) -> Outcome:
        values = [score(self.metric, of, self.task.test_labels) for of in scores]
        return Outcome(values, confusion_counts(scores, self.task), choice)

    def _random(self, bank: Bank, reference: str) -> Outcome:
        routes = random_routes(bank, len(self.draws), self.settings.seed, Path(self.task.name).name)
        scores = [self._route_scores(bank, reference, r)[n] for n, r in enumerate(routes)]
        return self._outcome(scores, {"chosen": ["-".join(map(str, r)) for r in routes]})

    def _oracle(self, bank: Bank, reference: str) -> Outcome:
        """The best of the routes; the values of each are in `choice`."""
        routes = candidate_routes(bank)
        scores = [self._route_scores(bank, reference, route) for route in routes]
        labels = self.task.test_labels
        values = oracle_values(scores, partial(score, self.metric), labels, self.settings.seed)
        by_route = {
            "-".join(map(str, route)): float(np.mean([score(self.metric, s, labels) for s in of]))
            for route, of in zip(routes, scores, strict=True)
        }
        return Outcome(values, choice={"routes": by_route})

    def _by_labels(self, bank: Bank) -> Outcome:
        """Every draw's labels choose for that draw, its images where the labels are too few."""
        scores, strategies = [], []
        for number, rows in enumerate(self.draws):
            images = self.task.train.subset(rows.tolist())
            labels = self.task.train_labels[rows]
            try:
                choice = choose_by_probe(bank, images, labels, len(self.task.classes))
            except TooFewLabels:
                choice = bank.select(images)
            strategies.append(f"{choice.strategy} {'-'.join(map(str, choice.route))}")
            scores += self._scores(as_backbone(bank, choice), [number])
        return self._outcome(scores, {"chosen": strategies})


def as_backbone(bank: Bank, choice: Choice) -> Backbone:
    """The dense backbone of a choice."""
    return Backbone(bank.encoder_spec, bank.backbone(choice))


def choose_by_probe(
    bank: Bank, images: ImageDataset, labels: np.ndarray, num_classes: int
) -> Choice:
    """The candidate whose frozen features classify the labeled images best, by cross-validation.

    Candidates are the most used routes, the merge by the task's votes and the generalist; of equal
    ones the first, in the order of the task's votes. Raises TooFewLabels if a class has one image.
    """
    merged = bank.select(images, "merge")
    total = sum(merged.votes.values())
    routes = sorted(candidate_routes(bank), key=lambda route: -merged.votes[route])
    candidates = [merged, bank.select(images, "generalist")]
    for route in reversed(routes):
        made = replace(
            bank.route_choice(route),
            votes=merged.votes,
            share=merged.votes[route] / total,
            cluster_histogram=merged.cluster_histogram,
            similarity=merged.similarity,
        )
        candidates.insert(0, made)

    def value(choice: Choice) -> float:
        features = extract_features(
            bank.backbone(choice),
            bank.encoder_spec,
            images,
            device=bank.device,
            precision=bank.precision,
        )
        found = cross_validated(features.numpy(), labels, num_classes)
        if not found:
            raise TooFewLabels("strategy probe needs at least two labeled images of every class")
        return max(found.values())

    return max(candidates, key=value)


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
    settings = ProbeSettings(
        backbone=name, data=name, solver="lbfgs", num_labels=num_labels, draws=draws, seed=seed
    )
    evaluator = Evaluator(task, "accuracy", settings, bank.device, bank.precision)
    comparison = Comparison(name, bank.select(task.train))
    for method, backbone in dense.items():
        comparison.add(method, LINEAR, evaluator.probe(backbone).values)
    for method, how in (("moce", "auto"), ("random_route", "random"), ("oracle", "oracle")):
        comparison.add(method, LINEAR, evaluator.probe(bank, how).values)
    return comparison
