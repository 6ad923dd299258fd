"""Probe a backbone by the kind and solver of the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moce.config import ProbeSettings
from moce.data.dataset import ImageDataset
from moce.evaluation.sgd_probe import sgd_scores
from moce.evaluation.sklearn_probe import knn_scores, linear_scores
from moce.evaluation.task import Task
from moce.inference.features import extract_features
from moce.weights.from_runs import Backbone

# From training rows and the number of the draw to scores [m, C] float32 of the test images.
Classifier = Callable[[np.ndarray, int], np.ndarray]


def is_sgd(settings: ProbeSettings) -> bool:
    return settings.kind == "linear" and settings.solver == "sgd"


def choose_pooling(settings: ProbeSettings, backbone: Backbone) -> str:
    """The given pooling or the default: the published recipe uses the class token."""
    if settings.pooling is not None:
        return settings.pooling
    published = is_sgd(settings) and backbone.vit.cls_token is not None
    return "cls" if published else "mean"


@dataclass
class Probe:
    """Classifiers on the frozen features of one backbone for one task."""

    backbone: Backbone
    task: Task
    settings: ProbeSettings
    device: torch.device
    precision: str

    def __post_init__(self) -> None:
        self.pooling = choose_pooling(self.settings, self.backbone)

    def classifier(self) -> Classifier:
        """Extract the test images' features and return the classifier."""
        test = self._features(self.task.test)
        return self._by_sgd(test) if is_sgd(self.settings) else self._by_features(test)

    def _by_sgd(self, test: Tensor) -> Classifier:
        def classify(rows: np.ndarray, draw: int) -> np.ndarray:
            settings = self.settings.model_copy(update={"seed": self.settings.seed + draw})
            return sgd_scores(
                self.backbone,
                self.task.train.subset(rows.tolist()),
                self.task.train_labels[rows],
                test,
                len(self.task.classes),
                settings,
                self.pooling,
                self.device,
                self.precision,
            )

        return classify

    def _by_features(self, test: Tensor) -> Classifier:
        train = self._features(self.task.train).numpy()
        scores: Callable[..., np.ndarray] = linear_scores
        if self.settings.kind == "knn":
            scores = partial(knn_scores, neighbors=self.settings.neighbors)

        def classify(rows: np.ndarray, draw: int) -> np.ndarray:
            labels = self.task.train_labels[rows]
            return scores(train[rows], labels, test.numpy(), len(self.task.classes))

        return classify

    def _features(self, images: ImageDataset) -> Tensor:
        return extract_features(
            self.backbone.vit,
            self.backbone.spec,
            images,
            device=self.device,
            precision=self.precision,
            pooling=self.pooling,
            batch_size=self.settings.micro_batch_size,
        )
