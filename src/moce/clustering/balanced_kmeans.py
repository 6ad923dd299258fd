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

from moce.clustering.features import CHUNK_SIZE, Rows, without_copies
from moce.clustering.init import draw, fill_empty, plus_plus, reseed_empty
from moce.clustering.sinkhorn import (
    Similarities,
    Sums,
    balanced_potentials,
    column_masses,
    score_pass,
)
from moce.errors import MoceError

SAMPLE = 256  # images per cluster of the first stage
SEEDED = 64  # of these, per cluster, that seeds are drawn from
# While centroids still move, potentials carried over from the last round need few iterations.
ROUND_ITERATIONS, FINAL_ITERATIONS = 10, 1000
LAGGING = 0.1  # damping of a step that is made together with one of the centroids
RESCUES = 5  # tries to fill clusters whose centroids have merged with others


@dataclass
class Clustering:
    """centroids: [K, D] unit; potentials: [K]; assignment: [n] int64 of the images given; all of one fit.

    sizes: [K] int64 and similarity, the mean cosine of images and centroids: over all processes.
    marginal_error: the largest relative error of a cluster's mass, copies of images not counted.
    """

    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    sizes: Tensor
    iterations: int
    similarity: float
    marginal_error: float


@dataclass
class Iteration:
    """Where a fit stands after a round: all that is needed to go on, and how the round went.

    step: rounds done in all; number: in this stage, 0 (a sample) or 1 (all images); settled: whether
    the stage is over. assignment: [n] int32 of this process's images of the stage. guide: [K], the
    potentials that balance the sample under these centroids (stage 1 after a sample).
    """

    stage: int
    number: int
    step: int
    settled: bool
    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    sample_potentials: Tensor
    moved: float = 1.0
    marginal_error: float = 0.0
    similarity: float = 0.0


@dataclass
class Callbacks:
    """Who is told of a fit: of every round, and of every sweep over the images."""

    on_round: Callable[[Iteration], None] = lambda state: None
    on_sweep: Callable[[], None] = lambda: None


def balanced_kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    epsilon: float = 0.01,
    update: str = "hard",
    tolerance: float = 1e-2,
    max_iterations: int = 50,
    settled: float = 5e-3,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
    spread: bool = False,
    device: torch.device | None = None,
    start: Iteration | None = None,
    watch: Callbacks | None = None,
) -> Clustering:
    """Group unit features [n, D] into clusters of similar size.

    Rounds go on until at most the share `settled` of the images changes cluster, at most
    `max_iterations` in each stage. Copies of an image share its cluster, and count once in the fit: no
    split of them could be kept apart. Every cluster has an image and no two centroids are alike.

    spread: every process of the run gives other features, and all get the same clusters. device:
    where to compute; features may be larger than its memory, or a file. start: a Round to go on from.
    Raises MoceError if there are fewer distinct images than clusters or features are not finite.
    """
    rows = Rows(features, chunk_size=chunk_size, spread=spread, device=device)
    check_count(rows.count, num_clusters)
    rows, distinct = without_copies(rows)
    check_enough(distinct, num_clusters)
    fit = _Fit(
        num_clusters, epsilon, update, tolerance, max_iterations, settled, watch or Callbacks()
    )
    sample = _sample(rows, distinct, num_clusters, seed)
    state = start or fit.seeded(sample or rows, seed, stage=0 if sample else 1)
    if sample is not None and state.stage == 0:
        state = fit.onto_all(rows, sample, fit.iterations(sample, state))
    state = fit.iterations(rows, state, sample)
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


def _sample(rows: Rows, distinct: int, num_clusters: int, seed: int) -> Rows | None:
    """The rows that the first stage works on, the same in all processes; None if there are few anyway."""
    if distinct <= SAMPLE * num_clusters:
        return None
    which = draw(rows, distinct, SAMPLE * num_clusters, seed)
    return Rows(rows.pick(which), chunk_size=rows.chunk_size)


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
    max_iterations: int
    settled: float
    watch: Callbacks

    def seeded(self, rows: Rows, seed: int, stage: int) -> Iteration:
        """The state before the first round."""
        distinct = rows.count if rows.weights is None else int(rows.total(rows.weights.sum()))
        points = rows.pick(draw(rows, distinct, SEEDED * self.num_clusters, seed))
        centroids = _from_first(rows, plus_plus(points, self.num_clusters, seed))
        potentials = rows.zeros(self.num_clusters)
        return Iteration(stage, 0, 0, False, centroids, potentials, _nowhere(rows), potentials)

    def onto_all(self, rows: Rows, sample: Rows, state: Iteration) -> Iteration:
        """Where the rounds on all rows start: where those on the sample ended."""
        centroids = _from_first(rows, state.centroids)
        sample_potentials = _from_first(rows, self._guide(sample, centroids, state.potentials))
        return Iteration(
            1, 0, state.step, False, centroids, sample_potentials, _nowhere(rows), sample_potentials
        )

    def iterations(self, rows: Rows, state: Iteration, sample: Rows | None = None) -> Iteration:
        """Rounds until they settle."""
        while not state.settled:
            state = self._round(rows, state, sample)
            self.watch.on_round(state)
        return state

    def _round(self, rows: Rows, state: Iteration, sample: Rows | None) -> Iteration:
        """Assign all rows; then, unless nearly all stayed, move the centroids.

        Without a sample the potentials are balanced beforehand, for the scores are kept. With one
        they are moved with the centroids, so that a round is one sweep: by Newton's method on the
        sums of all rows, and by as much as the potentials that balance the sample have moved.
        """
        centroids, potentials, sample_potentials = (
            state.centroids,
            state.potentials,
            state.sample_potentials,
        )
        similarities = self._similarities(rows, centroids, keep=sample is None)
        if sample is None:
            potentials = self._balanced(similarities, potentials, ROUND_ITERATIONS)
        soft, exact = self.update == "soft", sample is None
        sums = score_pass(similarities, potentials, state.assignment, soft=soft, exact=exact)
        self.watch.on_sweep()
        empty = sums.sizes == 0
        settled = sums.moved <= self.settled and not bool(empty.any())
        settled = settled or state.number + 1 == self.max_iterations
        if not settled:
            centroids = moved_centroids(sums, centroids)
            centroids = reseed_empty(rows, centroids, state.assignment, sums.sizes)
            if sample is not None:
                sample_potentials = _from_first(
                    rows, self._guide(sample, centroids, state.sample_potentials)
                )
                potentials = potentials + sums.masses.newton_step(LAGGING).to(potentials)
                potentials = potentials + sample_potentials - state.sample_potentials
            potentials = torch.where(empty, potentials.mean(), potentials)
        return replace(
            state,
            number=state.number + 1,
            step=state.step + 1,
            settled=settled,
            centroids=centroids,
            potentials=potentials,
            sample_potentials=sample_potentials,
            moved=sums.moved,
            marginal_error=sums.masses.error,
            similarity=sums.similarity,
        )

    def _guide(self, sample: Rows, centroids: Tensor, potentials: Tensor) -> Tensor:
        """Potentials that balance the sample."""
        similarities = self._similarities(sample, centroids, keep=True)
        return self._balanced(similarities, potentials, ROUND_ITERATIONS, lambda: None)

    def finish(self, rows: Rows, state: Iteration) -> Clustering:
        """Balanced potentials under which no cluster is empty, and the assignment by them.

        Centroids that have merged cannot be told apart by potentials: the empty ones move away
        first. Raises MoceError if clusters stay empty all the same.
        """
        centroids, potentials = state.centroids, state.potentials
        for _ in range(RESCUES):
            similarities = self._similarities(rows, centroids, keep=True)
            potentials = self._balanced(similarities, potentials, FINAL_ITERATIONS)
            sums = score_pass(similarities.of_all(), potentials, state.assignment)
            if bool((sums.sizes == 0).any()):
                filled = fill_empty(similarities, potentials)
                if filled is None:
                    sums = score_pass(similarities, potentials, state.assignment)
                    centroids = reseed_empty(rows, centroids, state.assignment, sums.sizes)
                    continue
                potentials = filled
                sums = score_pass(similarities.of_all(), potentials, state.assignment)
            assignment, sizes = state.assignment.long().to(rows.device), sums.sizes.long()
            masses = sums.masses
            if rows.weights is not None:  # those of the sweep count copies
                masses = column_masses(similarities, potentials)
            return Clustering(
                centroids, potentials, assignment, sizes, state.step, sums.similarity, masses.error
            )
        raise MoceError(
            f"cannot fill {len(centroids)} clusters: too many images are alike; use fewer clusters"
        )

    def _similarities(self, rows: Rows, centroids: Tensor, *, keep: bool) -> Similarities:
        return Similarities(rows, centroids, self.epsilon, keep=keep)

    def _balanced(
        self,
        similarities: Similarities,
        potentials: Tensor,
        iterations: int,
        on_sweep: Callable[[], None] | None = None,
    ) -> Tensor:
        return balanced_potentials(
            similarities, potentials, self.tolerance, iterations, on_sweep or self.watch.on_sweep
        )


def moved_centroids(sums: Sums, previous: Tensor) -> Tensor:
    """Unit mean of the features of each cluster, [K, D]; one without any keeps its centroid."""
    some = sums.features.norm(dim=1, keepdim=True) > 1e-6
    return torch.where(some, normalize(sums.features, dim=1).to(previous), previous)
