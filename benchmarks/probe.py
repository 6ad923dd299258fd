"""The linear probe by L-BFGS beside scikit-learn's own grid search and torch's L-BFGS.

    python -m benchmarks.probe --only few     # three minutes on 2 idle cores
    python -m benchmarks.probe --only many    # three minutes
    python -m benchmarks.probe --only most    # three minutes
    python -m benchmarks.draw                 # the tables of docs/performance.md

Each turn is a whole probe of each: three strengths on three folds, one fit on all, scores of 1,000 test
images. The largest case is one fit of one strength. All minimize the same function and stop at the same
gradient. Features lie around a mean for each class; their spectrum falls like that of an encoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.measure import FOLDER, Row, Work, chosen, in_turns, keep, options
from moce.evaluation.sklearn_probe import FOLDS, STRENGTHS, linear_scores, scores_at

RESULTS = FOLDER / "probe.json"
PACKAGES = ("moce", "scikit-learn", "scipy", "torch")
OURS, SKLEARN, TORCH = "moce", "scikit-learn, GridSearchCV", "torch.optim.LBFGS"
WIDTH, TEST = 768, 1000
TOLERANCE, ITERATIONS = 1e-3, 200  # of all: largest entry of the gradient; most iterations
ONE = 0.1  # strength of a case without a choice


@dataclass(frozen=True)
class Problem:
    """images: to train on; choose: whether the strength is chosen among three."""

    images: int
    classes: int
    choose: bool = True
    threads: int = 2


PARTS = {
    "few": (Problem(1000, 10), Problem(1000, 100), Problem(5000, 100), Problem(50_000, 10)),
    "many": (Problem(10_000, 1000), Problem(50_000, 100)),
    "most": (Problem(50_000, 1000, choose=False),),
}
REPEATS = {"few": 3, "many": 1, "most": 1}
SHORT = {"test": (Problem(90, 3, threads=1), Problem(90, 3, choose=False, threads=1))}


def features(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Training images, then test images, [n + TEST, WIDTH] float32, and the class of each."""
    numbers = np.random.default_rng(0)
    spectrum = np.arange(1, WIDTH + 1) ** -0.75
    count = problem.images + TEST
    labels = np.arange(count) % problem.classes
    means = 0.5 * numbers.normal(size=(problem.classes, WIDTH))
    mix = numbers.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    points = numbers.normal(size=(count, WIDTH)).astype(np.float32)
    points += means.astype(np.float32)[labels]
    return points * spectrum.astype(np.float32) @ mix, labels


def by_sklearn(problem: Problem, train: np.ndarray, labels: np.ndarray, test: np.ndarray):
    """Scores of the test images by what scikit-learn's user guide would have one write."""
    regression = LogisticRegression(C=ONE, max_iter=ITERATIONS, tol=TOLERANCE)
    pipeline = make_pipeline(StandardScaler(), regression)
    if problem.choose:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        grid = {"logisticregression__C": STRENGTHS}
        pipeline = GridSearchCV(pipeline, grid, cv=folds)
    return pipeline.fit(train, labels).decision_function(test)


def torch_fit(
    strength: float, train: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], Tensor]:
    """A function from features to logits, fitted by torch's L-BFGS with a strong Wolfe search."""
    scaler = StandardScaler()
    rows, targets = torch.from_numpy(scaler.fit_transform(train)), torch.from_numpy(labels)
    weight = torch.zeros(WIDTH, int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * strength * len(rows))
        loss = cross_entropy(torch.addmm(bias, rows, weight), targets) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda other: (torch.from_numpy(scaler.transform(other)) @ weight + bias).detach()


def by_torch(problem: Problem, train: np.ndarray, labels: np.ndarray, test: np.ndarray):
    """The same choice of a strength, and the last fit, by torch."""
    best = ONE
    if problem.choose:
        folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(train, labels))

        def accuracy(strength: float) -> float:
            fits = [(torch_fit(strength, train[a], labels[a]), b) for a, b in folds]
            return sum(
                float((fit(train[b]).argmax(1).numpy() == labels[b]).mean()) for fit, b in fits
            )

        best = max(STRENGTHS, key=accuracy)
    return torch_fit(best, train, labels)(test).numpy()


def by_moce(problem: Problem, train: np.ndarray, labels: np.ndarray, test: np.ndarray):
    if problem.choose:
        return linear_scores(train, labels, test, problem.classes)
    return scores_at(ONE, train, labels, test, problem.classes)


Scores = Callable[[Problem, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
CANDIDATES: dict[str, Scores] = {OURS: by_moce, SKLEARN: by_sklearn, TORCH: by_torch}
ONE_THREAD = ", 1 thread"  # as quick on small cases; on large ones it takes minutes


def candidates(problem: Problem) -> dict[str, Scores]:
    """Theirs in all threads, and, if the case is small, in one."""
    small = problem.images * problem.classes <= 500_000
    alone = {name + ONE_THREAD: CANDIDATES[name] for name in (SKLEARN, TORCH) if small}
    return CANDIDATES | alone


def speed(problem: Problem, repeats: int) -> list[Row]:
    """Rows of every candidate, with the accuracy of its scores on the test images."""
    torch.set_num_threads(problem.threads)
    points, labels = features(problem)
    count = problem.images
    accuracy: dict[str, float] = {}

    def work(name: str, scores_of: Scores) -> Work:
        threads = 1 if name.endswith(ONE_THREAD) else problem.threads

        def step() -> None:
            torch.set_num_threads(threads)
            with threadpool_limits(threads, user_api="blas"):
                found = scores_of(problem, points[:count], labels[:count], points[count:])
            accuracy[name] = round(float((found.argmax(1) == labels[count:]).mean()), 4)

        return step

    steps = {name: work(name, scores_of) for name, scores_of in candidates(problem).items()}
    rows = in_turns(steps, repeats, warmups=0)
    return [row | vars(problem) | {"accuracy": accuracy[row["candidate"]]} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    torch_fit(ONE, *(part[:50] for part in features(Problem(50, 5))))  # torch imports on its first
    for name, part in chosen(asked.only, SHORT if asked.short else PARTS).items():
        rows = [
            row for problem in part for row in speed(problem, asked.repeats or REPEATS.get(name, 1))
        ]
        keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
