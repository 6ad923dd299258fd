"""Balanced k-means: alternate balanced assignment and centroid update.

Hard updates and a small epsilon are the defaults: with soft updates and epsilon 0.05, centroids
merge (4,000 points with 8 modes, K = 64: 12 distinct centroids were left).

Large sets are clustered in two stages: cheap iterations on a sample first, then iterations on all
images, which start from the result. An iteration on all images is one pass over the features:
assignment, centroid sums and column sums for the potentials come from the same scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.features import CHUNK_SIZE, Rows, mask_duplicates
from moce.clustering.init import draw, fill_empty, plus_plus, reseed_empty
from moce.clustering.score_pass import Sums, score_pass
from moce.clustering.sinkhorn import Scores, balanced_potentials, column_masses
from moce.errors import MoceError

SAMPLE = 256  # images per cluster in the first stage
SEED_SAMPLE = 64  # images per cluster to draw seeds from
CONVERGED = 5e-3  # share of images that change cluster, at which a stage ends
# While centroids still move, potentials start from the last iteration's and need few steps.
BALANCE_STEPS, FINAL_BALANCE_STEPS = 10, 1000
JOINT_DAMPING = 0.1  # of a Newton step made together with a centroid update
RESCUES = 5  # attempts to fill clusters whose centroids have merged with others


@dataclass
class Clustering:
    """The result: centroids [K, D] of unit norm, dual potentials [K], and the assignment by them.

    assignment: [n] int64, of this process's images. sizes: [K] int64, and similarity, the mean
    cosine of images and their centroids: of all processes. marginal_error: the largest relative
    error of a cluster's mass, without duplicates.
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
    """The state after an iteration, complete for resuming, and its statistics.

    stage: 0 (on a sample) or 1 (on all images). number: iterations of this stage; step: of both.
    converged: the stage is over. assignment: [n] int32, of this process's images of the stage.
    sample_potentials: [K], balance the sample under these centroids (stage 1 after a sample).
    """

    stage: int
    number: int
    step: int
    converged: bool
    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    sample_potentials: Tensor
    moved: float = 1.0
    marginal_error: float = 0.0
    similarity: float = 0.0


@dataclass
class Callbacks:
    """Called after every iteration, and after every pass over the images."""

    on_iteration: Callable[[Iteration], None] = lambda state: None
    on_pass: Callable[[], None] = lambda: None


def balanced_kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    epsilon: float = 0.01,
    update: str = "hard",
    tolerance: float = 1e-2,
    max_iterations: int = 50,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
    sharded: bool = False,
    device: torch.device | None = None,
    start: Iteration | None = None,
    callbacks: Callbacks | None = None,
) -> Clustering:
    """Group unit features [n, D] into clusters of similar size.

    A stage ends when at most the share CONVERGED of the images changes cluster, or after
    `max_iterations`. Duplicates of an image share its cluster and count once. No cluster of the
    result is empty, and no two centroids are equal.

    tolerance: largest relative error of a cluster's mass. sharded: every process passes other
    features, and all get the same clusters. device: where to compute; the features may be a mapped
    file, larger than memory. start: resume from this state.
    Raises MoceError if there are fewer distinct images than clusters or features are not finite.
    """
    rows = Rows(features, chunk_size=chunk_size, sharded=sharded, device=device)
    check_enough(rows.count, num_clusters)
    rows, distinct = mask_duplicates(rows)
    check_enough(distinct, num_clusters)
    fit = _Fit(num_clusters, epsilon, update, tolerance, max_iterations, callbacks or Callbacks())
    sample = _sample(rows, distinct, num_clusters, seed)
    state = start or fit.init(sample or rows, seed, stage=0 if sample else 1)
    if sample is not None and state.stage == 0:
        state = fit.init_from_sample(rows, sample, fit.iterate(sample, state))
    state = fit.iterate(rows, state, sample)
    return fit.finish(rows, state)


def check_enough(distinct: int, num_clusters: int) -> None:
    """Raise MoceError if there are fewer distinct images than clusters."""
    if distinct < num_clusters:
        raise MoceError(
            f"{num_clusters} clusters need as many distinct images, and there are {distinct}; "
            "lower num_clusters"
        )


def _sample(rows: Rows, distinct: int, num_clusters: int, seed: int) -> Rows | None:
    """The rows of the first stage, the same in all processes; None if there are few anyway."""
    if distinct <= SAMPLE * num_clusters:
        return None
    drawn = draw(rows, distinct, SAMPLE * num_clusters, seed)
    return Rows(rows.select(drawn), chunk_size=rows.chunk_size)


def _unassigned(rows: Rows) -> Tensor:
    return torch.full((len(rows),), -1, dtype=torch.int32)


@dataclass
class _Fit:
    """The settings of a clustering, and its steps."""

    num_clusters: int
    epsilon: float
    update: str
    tolerance: float
    max_iterations: int
    callbacks: Callbacks

    def init(self, rows: Rows, seed: int, stage: int) -> Iteration:
        """The state before the first iteration: k-means++ centroids, no assignment."""
        distinct = rows.count if rows.weights is None else int(rows.all_reduce(rows.weights.sum()))
        points = rows.select(draw(rows, distinct, SEED_SAMPLE * self.num_clusters, seed))
        centroids = rows.from_first(plus_plus(points, self.num_clusters, seed))
        zeros = rows.zeros(self.num_clusters)
        return Iteration(stage, 0, 0, False, centroids, zeros, _unassigned(rows), zeros)

    def init_from_sample(self, rows: Rows, sample: Rows, state: Iteration) -> Iteration:
        """The state before the first iteration on all rows, from the last one on the sample."""
        centroids = rows.from_first(state.centroids)
        potentials = rows.from_first(self._balance_sample(sample, centroids, state.potentials))
        assignment = _unassigned(rows)
        return Iteration(1, 0, state.step, False, centroids, potentials, assignment, potentials)

    def iterate(self, rows: Rows, state: Iteration, sample: Rows | None = None) -> Iteration:
        """Iterations until the stage has converged."""
        while not state.converged:
            state = self._iteration(rows, state, sample)
            self.callbacks.on_iteration(state)
        return state

    def _iteration(self, rows: Rows, state: Iteration, sample: Rows | None) -> Iteration:
        """Assign all rows; unless the stage has converged, update the centroids.

        Without a sample, potentials are balanced before the assignment, on cached scores. With one
        they are updated after it, so that an iteration is a single pass.
        """
        scores = Scores(rows, state.centroids, self.epsilon, cache=sample is None)
        if sample is None:
            state = replace(state, potentials=self._balance(scores, state.potentials))
        soft, exact = self.update == "soft", sample is None
        sums = score_pass(scores, state.potentials, state.assignment, soft=soft, exact=exact)
        self.callbacks.on_pass()
        empty = sums.sizes == 0
        converged = sums.moved <= CONVERGED and not bool(empty.any())
        converged = converged or state.number + 1 == self.max_iterations
        if not converged:
            centroids = updated_centroids(sums, state.centroids)
            centroids = reseed_empty(rows, centroids, state.assignment, sums.sizes)
            state = replace(state, centroids=centroids)
            if sample is not None:
                state = self._update_potentials(rows, sample, state, sums)
            potentials = torch.where(empty, state.potentials.mean(), state.potentials)
            state = replace(state, potentials=potentials)
        return replace(
            state,
            number=state.number + 1,
            step=state.step + 1,
            converged=converged,
            moved=sums.moved,
            marginal_error=sums.masses.error,
            similarity=sums.similarity,
        )

    def _update_potentials(
        self, rows: Rows, sample: Rows, state: Iteration, sums: Sums
    ) -> Iteration:
        """Potentials for moved centroids without a further pass over all rows.

        A Newton step on the masses of all rows, plus the change of the potentials that balance the
        sample.
        """
        before = state.sample_potentials
        after = rows.from_first(self._balance_sample(sample, state.centroids, before))
        potentials = state.potentials + sums.masses.newton_step(JOINT_DAMPING).to(before)
        return replace(state, potentials=potentials + after - before, sample_potentials=after)

    def finish(self, rows: Rows, state: Iteration) -> Clustering:
        """Balance the potentials and assign all rows, so that no cluster is empty.

        Potentials cannot separate centroids that have merged: those of empty clusters are moved
        first. Raises MoceError if clusters stay empty.
        """
        for _ in range(RESCUES):
            scores = Scores(rows, state.centroids, self.epsilon, cache=True)
            potentials = self._balance(scores, state.potentials, FINAL_BALANCE_STEPS)
            state = replace(state, potentials=potentials)
            sums = score_pass(scores.with_duplicates(), potentials, state.assignment)
            if not bool((sums.sizes == 0).any()):
                return self._result(scores, state, sums)
            filled = fill_empty(scores, potentials)
            if filled is not None:
                state = replace(state, potentials=filled)
                sums = score_pass(scores.with_duplicates(), filled, state.assignment)
                return self._result(scores, state, sums)
            sums = score_pass(scores, potentials, state.assignment)
            centroids = reseed_empty(rows, state.centroids, state.assignment, sums.sizes)
            state = replace(state, centroids=centroids)
        raise MoceError(
            f"cannot fill {self.num_clusters} clusters: too many images are alike; use fewer "
            "clusters"
        )

    def _result(self, scores: Scores, state: Iteration, sums: Sums) -> Clustering:
        masses = sums.masses
        if scores.rows.weights is not None:  # the sums count duplicates
            masses = column_masses(scores, state.potentials)
        return Clustering(
            centroids=state.centroids,
            potentials=state.potentials,
            assignment=state.assignment.long().to(scores.rows.device),
            sizes=sums.sizes.long(),
            iterations=state.step,
            similarity=sums.similarity,
            marginal_error=masses.error,
        )

    def _balance(
        self, scores: Scores, potentials: Tensor, max_steps: int = BALANCE_STEPS
    ) -> Tensor:
        on_pass = self.callbacks.on_pass
        return balanced_potentials(scores, potentials, self.tolerance, max_steps, on_pass)

    def _balance_sample(self, sample: Rows, centroids: Tensor, potentials: Tensor) -> Tensor:
        scores = Scores(sample, centroids, self.epsilon, cache=True)
        return balanced_potentials(scores, potentials, self.tolerance, BALANCE_STEPS)


def updated_centroids(sums: Sums, previous: Tensor) -> Tensor:
    """Unit mean of the features of each cluster, [K, D]; unchanged for clusters without any."""
    some = sums.features.norm(dim=1, keepdim=True) > 1e-6
    return torch.where(some, normalize(sums.features, dim=1).to(previous), previous)
