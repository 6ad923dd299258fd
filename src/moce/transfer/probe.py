"""Classifiers on frozen features: logistic regression and k nearest neighbours (scikit-learn)."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits

STRENGTHS = (1e-2, 1e-1, 1.0)  # inverse regularisation C, on standardised features


def linear_predictions(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classes [m] that a logistic regression on features [n, d] and labels [n] gives test [m, d].

    Features are standardised; the regularisation is chosen by cross-validation on the training
    part.
    """
    with threadpool_limits(1):  # so small a problem only loses time to threads
        strength = _choose_strength(train, labels)
        return _classifier(strength).fit(train, labels).predict(test)


def _choose_strength(features: np.ndarray, labels: np.ndarray) -> float:
    folds = min(3, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return STRENGTHS[1]
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    parts = list(splitter.split(features, labels))

    def score(strength: float) -> float:
        return sum(
            _classifier(strength).fit(features[a], labels[a]).score(features[b], labels[b])
            for a, b in parts
        )

    return max(STRENGTHS, key=score)


def _classifier(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3))


def knn_predictions(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: int = 20
) -> np.ndarray:
    """Classes [m] by the k nearest neighbours in cosine similarity, votes weighted by closeness."""
    classifier = KNeighborsClassifier(min(neighbours, len(train)), weights="distance")
    return classifier.fit(normalize(train), labels).predict(normalize(test))
