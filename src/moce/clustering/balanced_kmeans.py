"""Balanced k-means: alternate balanced assignment and centroid update.

Hard updates and a small epsilon are the defaults: with soft updates and epsilon 0.05, centroids
merge (4,000 points with 8 modes, K = 64: 12 distinct centroids were left).

Large sets are clustered on a sample first. What is left for the iterations on all images, which
start from there, is little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.features import CHUNK_SIZE, Rows, without_duplicates
from moce.clustering.seeding import balanced_seeds, reseed_empty
from moce.clustering.sinkhorn import Scores, balanced_potentials
from moce.errors import MoceError

SAMPLE = 128  # images per cluster in the first stage
SEED_SAMPLE = 64  # images per cluster to draw seeds from
CONVERGED = 5e-3  # share of images that change cluster, at which a stage ends
GAIN = 1e-4  # or so small a relative growth of the mean similarity, so many times in a row:
PATIENCE, PATIENCE_AFTER_SAMPLE = 3, 2
# While centroids still move, potentials start from the last iteration's and need few steps.
BALANCE_STEPS, FINAL_BALANCE_STEPS = 6, 1000
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
    converged: the stage is over. assignment: [n] int32, of this process's images of the stage; -1
    before the first iteration and for duplicates. stalled: iterations in a row without growth of
    the similarity.
    """

    stage: int
    number: int
    step: int
    converged: bool
    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    stalled: int = 0
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
    epsilon: float = 0.005,
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

    A stage ends when at most the share CONVERGED of the images changes cluster, when the mean
    similarity stops growing, or after `max_iterations`. Duplicates of an image share its cluster
    and count once. No cluster of the result is empty.

    tolerance: largest relative error of a cluster's mass. sharded: every process passes other
    features, and all get the same clusters. device: where to compute; the features may be a mapped
    file, larger than memory. start: resume from this state.
    Raises MoceError if there are fewer distinct images than clusters or features are not finite.
    """
    rows = Rows(features, chunk_size=chunk_size, sharded=sharded, device=device)
    check_enough(rows.count, num_clusters)
    rows = without_duplicates(rows)
    check_enough(rows.count, num_clusters)
    fit = _Fit(num_clusters, epsilon, update, tolerance, max_iterations, callbacks or Callbacks())
    state = start
    sampled = rows.count > SAMPLE * num_clusters
    if sampled and (state is None or state.stage == 0):
        sample = rows.draw(SAMPLE * num_clusters, seed)
        state = fit.iterate(sample, state or fit.init(sample, seed, stage=0), PATIENCE)
        state = fit.on_all(rows, state)
    state = state or fit.init(rows, seed, stage=1)
    state = fit.iterate(rows, state, PATIENCE_AFTER_SAMPLE if sampled else PATIENCE)
    return fit.finish(rows, state)


def check_enough(distinct: int, num_clusters: int) -> None:
    """Raise MoceError if there are fewer distinct images than clusters."""
    if distinct < num_clusters:
        raise MoceError(
            f"{num_clusters} clusters need as many distinct images, and there are {distinct}; "
            "lower num_clusters"
        )


def _assignment(rows: Rows, cluster: Tensor | int) -> Tensor:
    """The cluster of each feature, [n] int32 on the CPU, from that of each row; else -1."""
    assignment = torch.full((len(rows.features),), -1, dtype=torch.int32)
    where = slice(None) if rows.index is None else rows.index.cpu()
    assignment[where] = torch.as_tensor(cluster).int().cpu()
    return assignment


@dataclass
class _Fit:
    """The settings of a clustering, and its steps."""

    num_clusters: int
    epsilon: float
    update: str
    tolerance: float
    max_iterations: int
    callbacks: Callbacks
    last: Scores | None = None

    def scores(self, rows: Rows, centroids: Tensor) -> Scores:
        """The scores of all rows; the last ones again if neither rows nor centroids have changed."""
        if self.last is None or self.last.rows is not rows or self.last.centroids is not centroids:
            self.last = None  # its memory, before the next one takes as much
            self.last = Scores(rows, centroids, self.epsilon, self.callbacks.on_pass)
        return self.last

    def init(self, rows: Rows, seed: int, stage: int) -> Iteration:
        """The state before the first iteration: centroids of balanced seeds, no assignment."""
        points = rows.draw(SEED_SAMPLE * self.num_clusters, seed).features
        seeds = balanced_seeds(points, self.num_clusters, seed).to(rows.device)
        zeros = rows.zeros(self.num_clusters)
        return Iteration(stage, 0, 0, False, rows.from_first(seeds), zeros, _assignment(rows, -1))

    def on_all(self, rows: Rows, state: Iteration) -> Iteration:
        """The state before the first iteration on all rows, from the last one on the sample."""
        centroids, potentials = rows.from_first(state.centroids), rows.from_first(state.potentials)
        return Iteration(1, 0, state.step, False, centroids, potentials, _assignment(rows, -1))

    def iterate(self, rows: Rows, state: Iteration, patience: int) -> Iteration:
        """Iterations until the stage has converged."""
        while not state.converged:
            state = self._iteration(rows, state, patience)
            self.callbacks.on_iteration(state)
        return state

    def _iteration(self, rows: Rows, state: Iteration, patience: int) -> Iteration:
        """Balance the potentials and assign; unless that has converged, update the centroids."""
        scores = self.scores(rows, state.centroids)
        potentials, error = balanced_potentials(
            scores, state.potentials, self.tolerance, BALANCE_STEPS
        )
        found = scores.assign(potentials, soft=self.update == "soft")
        assignment = _assignment(rows, found.cluster)
        changed = (assignment != state.assignment).sum()
        moved = int(rows.all_reduce(changed)) / rows.count
        stalls = found.similarity - state.similarity < GAIN * found.similarity
        stalled = state.stalled + 1 if stalls else 0
        settled = moved <= CONVERGED or stalled == patience
        converged = settled and bool((found.sizes > 0).all())
        converged = converged or state.number + 1 == self.max_iterations
        centroids = state.centroids
        if not converged:
            centroids = updated_centroids(found.features, centroids)
            centroids = reseed_empty(rows, centroids, found.cluster, found.sizes)
            potentials = torch.where(found.sizes == 0, potentials.mean(), potentials)
        return replace(
            state,
            number=state.number + 1,
            step=state.step + 1,
            converged=converged,
            centroids=centroids,
            potentials=potentials,
            assignment=assignment,
            stalled=stalled,
            moved=moved,
            marginal_error=error,
            similarity=found.similarity,
        )

    def finish(self, rows: Rows, state: Iteration) -> Clustering:
        """Balance the potentials and assign all images, so that no cluster is empty.

        Potentials cannot separate centroids that have merged: those of empty clusters are moved.
        Raises MoceError if clusters stay empty.
        """
        centroids, potentials = state.centroids, state.potentials
        for _ in range(RESCUES):
            scores = self.scores(rows, centroids)
            potentials, error = balanced_potentials(
                scores, potentials, self.tolerance, FINAL_BALANCE_STEPS
            )
            found = scores.assign(potentials)
            if bool((found.sizes > 0).all()):
                break
            centroids = reseed_empty(rows, centroids, found.cluster, found.sizes)
        else:
            raise MoceError(
                f"cannot fill {self.num_clusters} clusters: too many images are alike; use fewer "
                "clusters"
            )
        everything = replace(rows, index=None)
        if everything.count > rows.count:
            del scores
            self.last = None
            found = Scores(everything, centroids, self.epsilon).assign(potentials)
        return Clustering(
            centroids, potentials, found.cluster, found.sizes, state.step, found.similarity, error
        )


def updated_centroids(sums: Tensor, previous: Tensor) -> Tensor:
    """Unit mean of the features of each cluster, [K, D]; unchanged for clusters without any."""
    some = sums.norm(dim=1, keepdim=True) > 1e-6
    return torch.where(some, normalize(sums, dim=1).to(previous), previous)
