"""Logistic regression and k-NN on fixed features (scikit-learn).

Labels are class numbers, [n] int64, or, for several per image, [n, C] float32 of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits

from moce.evaluation.metrics import score
from moce.runtime.threads import num_worker_threads

STRENGTHS = (1e-2, 1e-1, 1.0)  # inverse regularization C, on standardized features
FOLDS = 3
WORTH_THREADS = 2**27  # multiplications of a product; a smaller one is faster in one thread


def linear_scores(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int
) -> np.ndarray:
    """Scores [m, num_classes] float32 of a logistic regression on features [n, d] for test [m, d].

    Features are standardized; the regularization is chosen by cross-validation on the training
    images. With several labels per image, each class has its own regression. A class without
    examples (or, with several labels, without counterexamples) gets the lowest score.
    """
    found = cross_validated(train, labels, num_classes)
    strength = max(found, key=lambda c: found[c]) if found else STRENGTHS[1]
    return scores_at(strength, train, labels, test, num_classes)


def scores_at(
    strength: float, train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int
) -> np.ndarray:
    """As `linear_scores` at one strength; products share torch's number of threads if large."""
    threads = torch.get_num_threads() if train.size * num_classes > WORTH_THREADS else 1
    with threadpool_limits(threads, user_api="blas"):
        return _scores(strength, train, labels, test, num_classes)


def cross_validated(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> dict[float, float]:
    """Mean score, 0..1, of each strength on held-out folds; empty if a class has one image.

    The fits run side by side, each in one thread: the scores do not depend on the number of threads.
    """
    folds = list(_folds(features, labels))
    metric = "map11" if labels.ndim == 2 else "accuracy"

    def score_of(fit: tuple[float, tuple[np.ndarray, np.ndarray]]) -> float:
        strength, (a, b) = fit
        scores = _scores(strength, features[a], labels[a], features[b], num_classes)
        return score(metric, scores, labels[b])

    fits = list(product(STRENGTHS, folds))
    with (
        ThreadPoolExecutor(num_worker_threads()) as pool,  # asked before BLAS is limited
        threadpool_limits(1, user_api="blas"),
    ):
        values = np.array(list(pool.map(score_of, fits))).reshape(len(STRENGTHS), len(folds))
    return {c: float(v.mean()) for c, v in zip(STRENGTHS, values, strict=True)} if folds else {}


def _folds(features: np.ndarray, labels: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Training and test rows of each fold; none if a class has one image."""
    if labels.ndim == 2:
        split = KFold(min(FOLDS, len(labels)), shuffle=True, random_state=0).split(features)
        return [
            (a, b) for a, b in split if labels[b].any()
        ]  # precision is undefined without labels
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return []
    return StratifiedKFold(folds, shuffle=True, random_state=0).split(features, labels)


def _scores(
    strength: float, train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int
) -> np.ndarray:
    """Scores [m, num_classes] float32 at one regularization strength."""
    scaler = StandardScaler()
    train, test = scaler.fit_transform(train), scaler.transform(test)
    known: dict[int, np.ndarray] = {}
    if labels.ndim == 1:
        decided = _decide(strength, train, labels, test)
        if decided.ndim == 1:  # with two classes, only the second one's
            decided = np.stack([-decided, decided], axis=1)
        known = dict(zip(np.unique(labels).tolist(), decided.T, strict=True))
    else:
        for number, answers in enumerate(labels.T):
            if len(np.unique(answers)) == 2:
                known[number] = _decide(strength, train, answers, test)
    lowest = min((float(values.min()) for values in known.values()), default=0.0) - 1
    scores = np.full((len(test), num_classes), lowest, np.float32)
    for number, values in known.items():
        scores[:, number] = values
    return scores


def _decide(strength: float, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    regression = LogisticRegression(C=strength, max_iter=200, tol=1e-3)
    return regression.fit(train, labels).decision_function(test)


def knn_scores(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    neighbors: int = 20,
) -> np.ndarray:
    """Scores [m, num_classes] float32: votes of the k nearest in cosine similarity, weighted by 1/distance."""
    train, test, count = normalize(train), normalize(test), min(neighbors, len(train))
    if labels.ndim == 2:
        mean = KNeighborsRegressor(count, weights="distance").fit(train, labels)
        return mean.predict(test).astype(np.float32)
    votes = KNeighborsClassifier(count, weights="distance").fit(train, labels)
    scores = np.zeros((len(test), num_classes), np.float32)
    scores[:, votes.classes_] = votes.predict_proba(test)
    return scores
