"""Probe a backbone on a task, draw by draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moce.config import ProbeSettings
from moce.customization.bank import Bank
from moce.customization.selection import Choice, Route, route_name
from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.evaluation.metrics import confusion_counts, score
from moce.evaluation.probe import build_probe, choose_pooling
from moce.evaluation.routes import best_values, candidate_routes, random_routes
from moce.evaluation.sgd_probe import FrozenEncoder
from moce.evaluation.sklearn_probe import cross_validated
from moce.evaluation.task import Task, draw_labels
from moce.inference.features import extract_features
from moce.runtime.distributed import run_on_rank0
from moce.weights.from_runs import Backbone

STRATEGIES = ("route", "merge", "generalist")  # that `auto` chooses from


class TooFewLabels(MoceError):
    """Cross-validation needs at least two labeled images of every class."""


@dataclass
class Outcome:
    """values: the metric, 0..1, per draw; confusion: summed over the draws; choice: of a MoCE run.

    adaptation: what was done to adapt the backbone, as adaptation.json has it.
    """

    values: list[float]
    confusion: list[list[int]] | None = None
    choice: dict[str, Any] | None = None
    adaptation: dict[str, Any] | None = None


class Evaluator:
    """One task and its draws of labels, which are the same for every backbone."""

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
        # By MoCE run and route, for all draws: random, best and chosen ones share routes.
        self._route_cache: dict[tuple[str, Route], list[np.ndarray]] = {}

    def probe(
        self, model: Backbone | Bank, selection: str | None = None, reference: str = ""
    ) -> Outcome:
        """Probe a backbone, or the backbones that a MoCE run gives for this task.

        selection: how to customize a bank: a strategy, random, best_route, best_strategy or probe.
        reference: names the bank, so that each of its routes is probed only once.
        """
        if isinstance(model, Backbone):
            return self._outcome(self._scores(model))
        if selection == "random":
            return self._random(model, reference)
        if selection == "best_route":
            return self._best_route(model, reference)
        if selection == "best_strategy":
            return self._best_strategy(model, reference)
        if selection == "probe":
            return self._by_labels(model)
        choice = model.select(self.task.train, selection or "auto")
        return self._outcome(self._choice_scores(model, reference, choice), choice.to_json())

    def _choice_scores(self, bank: Bank, reference: str, choice: Choice) -> list[np.ndarray]:
        """Scores [m, C] for every draw, with the dense backbone of a choice."""
        if choice.strategy == "route" and bank.model.gate_scale == "straight_through":
            return self._route_scores(bank, reference, choice.route)
        # A merge depends on the task, and so does the gate's scale under prob.
        return self._scores(as_backbone(bank, choice))

    def _route_scores(self, bank: Bank, reference: str, route: Route) -> list[np.ndarray]:
        """Scores [m, C] for every draw, with the dense backbone of a route."""
        key = reference, route
        if key not in self._route_cache:
            backbone = as_backbone(bank, bank.route_choice(route))
            self._route_cache[key] = self._scores(backbone)
        return self._route_cache[key]

    def _scores(self, backbone: Backbone, draw: int | None = None) -> list[np.ndarray]:
        """Scores [m, C] of the test images, for one draw or for all of them."""
        pooling = choose_pooling(self.settings, backbone)
        encoder = FrozenEncoder(backbone, self.settings, pooling, self.device, self.precision)
        classify = build_probe(encoder, self.task)
        numbers = range(len(self.draws)) if draw is None else [draw]
        return run_on_rank0(lambda: [classify(self.draws[number], number) for number in numbers])

    def _outcome(self, scores: list[np.ndarray], choice: dict[str, Any] | None = None) -> Outcome:
        values = [score(self.metric, of_draw, self.task.test_labels) for of_draw in scores]
        return Outcome(values, confusion_counts(scores, self.task), choice)

    def _random(self, bank: Bank, reference: str) -> Outcome:
        routes = random_routes(bank, len(self.draws), self.settings.seed, Path(self.task.name).name)
        scores = [self._route_scores(bank, reference, r)[n] for n, r in enumerate(routes)]
        return self._outcome(scores, {"chosen": [route_name(route) for route in routes]})

    def _best_route(self, bank: Bank, reference: str) -> Outcome:
        """The best route; `choice` holds the mean value of each."""
        routes = candidate_routes(bank)
        scores = {route_name(r): self._route_scores(bank, reference, r) for r in routes}
        return self._best_of("routes", scores)

    def _best_strategy(self, bank: Bank, reference: str) -> Outcome:
        """The best of route, merge and generalist: what `auto` could have chosen."""
        choices = [bank.select(self.task.train, strategy) for strategy in STRATEGIES]
        scores = {c.strategy: self._choice_scores(bank, reference, c) for c in choices}
        return self._best_of("strategies", scores)

    def _best_of(self, kind: str, scores: dict[str, list[np.ndarray]]) -> Outcome:
        """The best of several backbones, cross-fitted; `choice` holds the mean value of each."""
        labels, metric = self.task.test_labels, partial(score, self.metric)
        values = best_values(list(scores.values()), metric, labels, self.settings.seed)
        means = {
            name: float(np.mean([metric(of_draw, labels) for of_draw in draws]))
            for name, draws in scores.items()
        }
        return Outcome(values, choice={kind: means})

    def _by_labels(self, bank: Bank) -> Outcome:
        """Choose by the labels of each draw, or by its images where the labels are too few."""
        scores, chosen = [], []
        for number, rows in enumerate(self.draws):
            images = self.task.train.subset(rows.tolist())
            labels = self.task.train_labels[rows]
            try:
                choice = choose_by_probe(bank, images, labels, len(self.task.classes))
            except TooFewLabels:
                choice = bank.select(images)
            chosen.append(f"{choice.strategy} {route_name(choice.route)}")
            scores += self._scores(as_backbone(bank, choice), number)
        return self._outcome(scores, {"chosen": chosen})


def as_backbone(bank: Bank, choice: Choice) -> Backbone:
    """The dense backbone of a choice."""
    return Backbone(bank.encoder_spec, bank.backbone(choice))


def choose_by_probe(
    bank: Bank, images: ImageDataset, labels: np.ndarray, num_classes: int
) -> Choice:
    """The choice whose frozen features classify the labeled images best in cross-validation.

    Compares the most used routes, the merge by the task's votes and the generalist; a tie goes to the
    first, in the order of the task's votes. The choice has the scores of all. Raises TooFewLabels if
    a class has one image.
    """
    merged = bank.select(images, "merge")
    total = sum(merged.votes.values())
    routes = sorted(candidate_routes(bank), key=lambda route: -merged.votes[route])
    choices = [
        replace(
            bank.route_choice(route),
            votes=merged.votes,
            share=merged.votes[route] / total,
            cluster_histogram=merged.cluster_histogram,
            similarity=merged.similarity,
        )
        for route in routes
    ]
    choices += [merged, bank.select(images, "generalist")]

    def accuracy(choice: Choice) -> float:
        features = extract_features(
            bank.backbone(choice),
            bank.encoder_spec,
            images,
            device=bank.device,
            precision=bank.precision,
            shared=True,
        )
        found = run_on_rank0(lambda: cross_validated(features.numpy(), labels, num_classes))
        if not found:
            raise TooFewLabels("strategy probe needs at least two labeled images of every class")
        return max(found.values())

    scored = {_name(choice): (accuracy(choice), choice) for choice in choices}
    _, best = max(scored.values(), key=lambda pair: pair[0])
    return replace(best, scores={name: score for name, (score, _) in scored.items()})


def _name(choice: Choice) -> str:
    route = f" {route_name(choice.route)}" if choice.strategy == "route" else ""
    return choice.strategy + route
