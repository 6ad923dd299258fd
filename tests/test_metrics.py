"""Metrics against known values, and draws of labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from moce.errors import MoceError
from moce.evaluation.metrics import confusion, score
from moce.evaluation.task import draw_labels

# --- draws ----------------------------------------------------------------------------------------


def test_draws_of_multi_label_rows_are_plain_draws() -> None:
    labels = (np.random.default_rng(0).random((40, 5)) < 0.3).astype(np.float32)
    rows = draw_labels(labels, 11, seed=1)
    assert len(set(rows.tolist())) == 11 and sorted(rows) == rows.tolist()
    assert np.array_equal(rows, draw_labels(labels, 11, seed=1))
    assert not np.array_equal(rows, draw_labels(labels, 11, seed=2))
    assert len(draw_labels(labels, None, 0)) == 40


# --- metrics --------------------------------------------------------------------------------------

# Best classes 0 1 1 2, true ones 0 1 2 2 (class 3 occurs nowhere): three of four; 1, 1 and 1/2.
SCORES = np.array([[3, 1, 0, 0], [0, 2, 1, 0], [0, 5, 4, 1], [1, 0, 2, 0]], np.float32)
LABELS = np.array([0, 1, 2, 2])


def test_accuracies_by_hand() -> None:
    assert score("accuracy", SCORES, LABELS) == 0.75
    assert score("mean_per_class", SCORES, LABELS) == pytest.approx(2.5 / 3)
    assert confusion(SCORES, LABELS, 4).tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]


def test_accuracies_as_in_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    labels, scores = generator.integers(0, 7, 300), generator.normal(size=(300, 7))
    scores[np.arange(300), labels] += 1
    best = scores.argmax(1)
    assert score("mean_per_class", scores, labels) == pytest.approx(
        balanced_accuracy_score(labels, best)
    )
    assert np.array_equal(confusion(scores, labels, 7), confusion_matrix(labels, best))


def test_eleven_point_average_precision_by_hand() -> None:
    """Ranked truth 1 0 1 0: precision 1 up to recall 1/2 (six levels), 2/3 beyond (five)."""
    scores, labels = np.array([[4.0], [3.0], [2.0], [1.0]]), np.array([[1], [0], [1], [0]])
    assert score("map11", scores, labels) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # The one positive last of four: 1/4 at every level, and no credit for an empty ranking.
    assert score("map11", scores, np.array([[0], [0], [0], [1]])) == pytest.approx(1 / 4)


def test_eleven_point_levels_that_are_hit_exactly_count() -> None:
    """Three of ten found first: recall 3/10 reaches the levels 0 to 0.3 at precision 1."""
    labels = np.array([1] * 3 + [0] * 10 + [1] * 7)[:, None]
    scores = -np.arange(20.0)[:, None]
    assert score("map11", scores, labels) == pytest.approx((4 + 7 * 10 / 20) / 11)


def brute_force_map11(scores: np.ndarray, labels: np.ndarray) -> float:
    """From the definition, counting in whole numbers: recall >= k/10 where 10 hits >= k positives."""
    values = []
    for column in range(scores.shape[1]):
        truth = labels[np.argsort(-scores[:, column]), column].astype(int).tolist()
        hits = [sum(truth[: n + 1]) for n in range(len(truth))]
        if not hits[-1]:
            continue
        best = [
            max(hit / (n + 1) for n, hit in enumerate(hits) if 10 * hit >= level * hits[-1])
            for level in range(11)
        ]
        values.append(sum(best) / 11)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(5))
def test_eleven_point_average_precision_by_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = (generator.random((60, 6)) < 0.3).astype(np.float32)
    labels[:, 5] = 0  # a class that does not occur
    scores = labels + generator.normal(size=labels.shape)
    assert score("map11", scores, labels) == pytest.approx(brute_force_map11(scores, labels))


def test_metrics_that_do_not_suit_are_refused() -> None:
    several = np.eye(4)[LABELS]
    for metric, labels in (("accuracy", several), ("mean_per_class", several), ("map11", LABELS)):
        with pytest.raises(MoceError, match="label"):
            score(metric, SCORES, labels)
    with pytest.raises(MoceError, match="valid: accuracy, mean_per_class, map11"):
        score("f1", SCORES, LABELS)
    with pytest.raises(MoceError, match="map11 needs"):
        score("map11", SCORES, 0 * several)
