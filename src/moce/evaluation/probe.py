"""The probe of a frozen backbone: by SGD, by scikit-learn's logistic regression, or by k-NN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from moce.config import ProbeSettings
from moce.evaluation.sgd_probe import FrozenEncoder, sgd_scores
from moce.evaluation.sklearn_probe import knn_scores, linear_scores
from moce.evaluation.task import Task
from moce.weights.from_runs import Backbone

# From training rows and the number of the draw to scores [m, C] float32 of the test images.
Classifier = Callable[[np.ndarray, int], np.ndarray]


def is_sgd(settings: ProbeSettings) -> bool:
    return settings.kind == "linear" and settings.solver == "sgd"


def choose_pooling(settings: ProbeSettings, backbone: Backbone) -> str:
    """The given pooling or the default: the published recipe uses the class token.

    That of a model fine-tuned on the mean of its patch tokens says nothing.
    """
    if settings.pooling is not None:
        return settings.pooling
    vit = backbone.vit
    published = is_sgd(settings) and vit.cls_token is not None
    published = published and isinstance(vit.fc_norm, nn.Identity)
    return "cls" if published else "mean"


def build_probe(encoder: FrozenEncoder, task: Task) -> Classifier:
    """Extract the features of the test images, and of the training images if they are fixed."""
    settings, num_classes = encoder.settings, len(task.classes)
    test = encoder.features(task.test)

    def by_sgd(rows: np.ndarray, draw: int) -> np.ndarray:
        own = settings.model_copy(update={"seed": settings.seed + draw})
        images, labels = task.train.subset(rows.tolist()), task.train_labels[rows]
        return sgd_scores(replace(encoder, settings=own), images, labels, test, num_classes)

    if is_sgd(settings):
        return by_sgd
    train = encoder.features(task.train).numpy()

    def by_features(rows: np.ndarray, draw: int) -> np.ndarray:
        labels = task.train_labels[rows]
        if settings.kind == "knn":
            return knn_scores(train[rows], labels, test.numpy(), num_classes, settings.neighbors)
        return linear_scores(train[rows], labels, test.numpy(), num_classes)

    return by_features
