"""Classifiers on frozen features: logistic regression and k nearest neighbours (scikit-learn)."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

STRENGTHS = (1e-3, 1e-2, 1e-1)  # inverse regularisation C, on standardised features


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Top-1 accuracy of a logistic regression, features [n, d] float32, labels [n] int64.

    The regularisation is chosen by cross-validation on the training part; the test part is only
    scored.
    """
    strength = _choose_strength(train, train_labels)
    return float(_classifier(strength).fit(train, train_labels).score(test, test_labels))


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


def knn_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    neighbours: int = 20,
) -> float:
    """Top-1 accuracy of the k nearest neighbours by cosine similarity, votes weighted by closeness."""
    k = min(neighbours, len(train))
    classifier = KNeighborsClassifier(k, weights="distance")
    return float(
        classifier.fit(normalize(train), train_labels).score(normalize(test), test_labels)
    )
