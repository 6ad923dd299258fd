"""Balanced k-means: alternate a Sinkhorn-Knopp assignment and an update of the centroids.

The hard update and a small epsilon are the defaults: with soft updates and epsilon 0.05,
centroids merge (4,000 points with 8 modes, K = 64: 12 distinct centroids were left).

Large sets are clustered in two stages: rounds on a sample, which cost little, and then rounds on
all images from where those ended. A round on all images is one sweep: assignment, sums for the
centroids and column sums for the potentials come from the same scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.rows import CHUNK_SIZE, Rows, chunks, without_copies
from moce.clustering.seeding import draw, fill_empty, plus_plus, reseed_empty
from moce.clustering.sinkhorn import Similarities, Sums, balanced_potentials, scores, sweep
from moce.errors import MoceError

SAMPLE, SEEDED = (
    256,
    64,
)  # images per cluster of the first stage; of those that seeds are drawn from
# While centroids still move, potentials carried over from the last round need few iterations.
ROUND_ITERATIONS, FINAL_ITERATIONS = 5, 1000
LAGGING = 0.1  # damping of a step that is made together with one of the centroids
RESCUES = 5  # tries to fill clusters whose centroids have merged with others


@dataclass
class Clustering:
    """centroids: [K, D] unit; potentials: [K]; assignment: [n] int64 of the images given; all of one fit.

    sizes: [K] int64 and similarity, the mean cosine of images and centroids: over all processes.
    """

    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    sizes: Tensor
    rounds: int
    similarity: float


@dataclass
class Round:
    """Where a fit stands after a round: all that is needed to go on, and how the round went.

    step: rounds done in all; number: in this stage, 0 (a sample) or 1 (all images); settled: whether
    the stage is over. assignment: [n] int32 of this process's images of the stage.
    """

    stage: int
    number: int
    step: int
    settled: bool
    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    moved: float = 1.0
    marginal_error: float = 0.0
    similarity: float = 0.0


@dataclass
class Watch:
    """Who is told of a fit: of every round, and of every sweep over the images."""

    on_round: Callable[[Round], None] = lambda state: None
    on_sweep: Callable[[], None] = lambda: None


def balanced_kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    epsilon: float = 0.01,
    update: str = "hard",
    tolerance: float = 1e-2,
    max_rounds: int = 50,
    settled: float = 5e-3,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
    spread: bool = False,
    device: torch.device | None = None,
    start: Round | None = None,
    watch: Watch | None = None,
) -> Clustering:
    """Group unit features [n, D] into clusters of similar size.

    Rounds go on until at most the share `settled` of the images changes cluster, at most
    `max_rounds` in each stage. Copies of an image share its cluster, and count once in the fit: no
    split of them could be kept apart. Every cluster has an image and no two centroids are alike.

    spread: every process of the run gives other features, and all get the same clusters. device:
    where to compute; features may be larger than its memory, or a file. start: a Round to go on from.
    Raises MoceError if there are fewer distinct images than clusters or features are not finite.
    """
    rows = Rows(features, chunk_size=chunk_size, spread=spread, device=device)
    check_count(rows.count, num_clusters)
    rows, distinct = without_copies(rows)
    check_enough(distinct, num_clusters)
    fit = _Fit(num_clusters, epsilon, update, tolerance, max_rounds, settled, watch or Watch())
    sampled = distinct > SAMPLE * num_clusters
    if sampled and (start is None or start.stage == 0):
        start = _on_sample(fit, rows, distinct, seed, start)
    if start is None:
        start = fit.seeded(rows, distinct, seed)
    state = fit.rounds(rows, start, 0 if sampled else ROUND_ITERATIONS)
    return fit.finish(rows, state)


def check_count(count: int, num_clusters: int) -> None:
    """Raise MoceError if there are fewer images than clusters."""
    if count < num_clusters:
        raise MoceError(
            f"{num_clusters} clusters need as many images, and there are {count}; lower num_clusters"
        )


def check_enough(distinct: int, num_clusters: int) -> None:
    """Raise MoceError unless there are at least `num_clusters` distinct features."""
    if distinct < num_clusters:
        raise MoceError(
            f"{num_clusters} clusters need as many distinct images, and there are "
            f"{distinct}; lower num_clusters"
        )


def _on_sample(fit: _Fit, rows: Rows, distinct: int, seed: int, start: Round | None) -> Round:
    """The first stage: rounds on a sample that every process has; where the second one starts."""
    which = draw(rows, distinct, SAMPLE * fit.num_clusters, seed)
    sample = Rows(rows.pick(which), chunk_size=rows.chunk_size)
    if start is None:
        start = fit.seeded(sample, len(which), seed, stage=0)
    state = fit.rounds(sample, start, ROUND_ITERATIONS)
    similarities = Similarities(sample, state.centroids, fit.epsilon, keep=True)
    potentials = balanced_potentials(
        similarities, state.potentials, fit.tolerance, FINAL_ITERATIONS, fit.watch.on_sweep
    )
    return replace(
        state,
        stage=1,
        number=0,
        settled=False,
        centroids=_from_first(rows, state.centroids),
        potentials=_from_first(rows, potentials),
        assignment=_nowhere(rows),
    )


def _from_first(rows: Rows, values: Tensor) -> Tensor:
    """What the first process has: others may have rounded otherwise."""
    return rows.total(values.clone() if rows.offset == 0 else torch.zeros_like(values))


def _nowhere(rows: Rows) -> Tensor:
    """An assignment to no cluster."""
    return torch.full((len(rows),), -1, dtype=torch.int32)


@dataclass
class _Fit:
    """The settings of a fit, and its steps."""

    num_clusters: int
    epsilon: float
    update: str
    tolerance: float
    max_rounds: int
    settled: float
    watch: Watch

    def seeded(self, rows: Rows, distinct: int, seed: int, stage: int = 1) -> Round:
        """The state before the first round."""
        points = rows.pick(draw(rows, distinct, SEEDED * self.num_clusters, seed))
        centroids = _from_first(rows, plus_plus(points, self.num_clusters, seed))
        potentials = rows.zeros(self.num_clusters)
        return Round(stage, 0, 0, False, centroids, potentials, _nowhere(rows))

    def rounds(self, rows: Rows, state: Round, iterations: int) -> Round:
        """Rounds until they settle, each with as many iterations of Sinkhorn-Knopp beforehand."""
        while not state.settled:
            state = self._round(rows, state, iterations)
            self.watch.on_round(state)
        return state

    def _round(self, rows: Rows, state: Round, iterations: int) -> Round:
        """Assign all rows; then, unless nearly all stayed, move centroids and potentials."""
        centroids, potentials = state.centroids, state.potentials
        similarities = self._similarities(rows, centroids, keep=iterations > 0)
        if iterations:
            potentials = self._balanced(similarities, potentials, iterations)
        sums = sweep(similarities, potentials, state.assignment, soft=self.update == "soft")
        self.watch.on_sweep()
        empty = sums.sizes == 0
        settled = sums.moved <= self.settled and not bool(empty.any())
        settled = settled or state.number + 1 == self.max_rounds
        if not settled:
            centroids = moved_centroids(sums, centroids)
            centroids = reseed_empty(rows, centroids, state.assignment, sums.sizes)
            if not iterations:
                potentials = potentials + sums.masses.newton_step(LAGGING).to(potentials)
            potentials = torch.where(empty, potentials.mean(), potentials)
        return replace(
            state,
            number=state.number + 1,
            step=state.step + 1,
            settled=settled,
            centroids=centroids,
            potentials=potentials,
            moved=sums.moved,
            marginal_error=sums.masses.error,
            similarity=sums.similarity,
        )

    def finish(self, rows: Rows, state: Round) -> Clustering:
        """Balanced potentials under which no cluster is empty, and the assignment by them.

        Centroids that have merged cannot be told apart by potentials: the empty ones move away
        first. Raises MoceError if clusters stay empty all the same.
        """
        centroids, potentials = state.centroids, state.potentials
        for _ in range(RESCUES):
            similarities = self._similarities(rows, centroids, keep=True)
            potentials = self._balanced(similarities, potentials, FINAL_ITERATIONS)
            sums = sweep(similarities.of_all(), potentials, state.assignment)
            if bool((sums.sizes == 0).any()):
                filled = fill_empty(similarities, potentials)
                if filled is None:
                    sums = sweep(similarities, potentials, state.assignment)
                    centroids = reseed_empty(rows, centroids, state.assignment, sums.sizes)
                    continue
                potentials = filled
                sums = sweep(similarities.of_all(), potentials, state.assignment)
            assignment, sizes = state.assignment.long().to(rows.device), sums.sizes.long()
            return Clustering(centroids, potentials, assignment, sizes, state.step, sums.similarity)
        raise MoceError(
            f"cannot fill {len(centroids)} clusters: too many images are alike; use fewer clusters"
        )

    def _similarities(self, rows: Rows, centroids: Tensor, *, keep: bool) -> Similarities:
        return Similarities(rows, centroids, self.epsilon, keep=keep)

    def _balanced(self, similarities: Similarities, potentials: Tensor, iterations: int) -> Tensor:
        return balanced_potentials(
            similarities, potentials, self.tolerance, iterations, self.watch.on_sweep
        )


def moved_centroids(sums: Sums, previous: Tensor) -> Tensor:
    """Unit mean of the features of each cluster, [K, D]; one without any keeps its centroid."""
    some = sums.features.norm(dim=1, keepdim=True) > 1e-6
    return torch.where(some, normalize(sums.features, dim=1).to(previous), previous)


def assign(
    features: Tensor,
    centroids: Tensor,
    potentials: Tensor,
    epsilon: float,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The cluster of every feature, [n] int64: argmax over clusters of Q."""
    parts = [
        scores(features[part], centroids, potentials, epsilon).argmax(dim=1)
        for part in chunks(features.shape[0], chunk_size)
    ]
    return torch.cat(parts)
