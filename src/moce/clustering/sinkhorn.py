"""Balanced assignment by Sinkhorn-Knopp, with Newton steps for the potentials.

Maximize Tr(Q^T S) + epsilon * H(Q) over Q >= 0 [n, K] whose rows sum to 1/n and columns to 1/K,
S the cosine similarities of images and centroids. The solution is
Q_ik = softmax_k(S_ik / epsilon + v_k) / n, so the dual potentials v [K] are all that is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moce.clustering.features import Rows

GRAM_ROWS = 2**15  # rows that estimate the derivative of the masses; fewer make it a poor one
FIRST_DAMPING, LONGEST_STEP = 0.1, 5.0
FAST = 0.3  # a step that leaves this share of the error needs no new derivative after it
HELPFUL = (
    0.999  # a step helps if it leaves less than this share: on a plateau rounding would decide
)
CACHE_BYTES = 2**31  # memory for the scores of all images, which saves the matrix product of a pass


@dataclass
class Masses:
    """Column sums of n Q over all processes, [K] in float64: all equal if balanced.

    derivative: [K, K] by v, diag(columns) - Q'^T Q' with Q' = n Q, from about GRAM_ROWS of the
    rows; None if it was not asked for.
    """

    columns: Tensor
    derivative: Tensor | None

    @property
    def errors(self) -> Tensor:
        """Relative error of each cluster's mass, [K]."""
        return (self.columns / self.columns.mean() - 1).abs()

    def sinkhorn_step(self) -> Tensor:
        """Sinkhorn-Knopp's change of v, [K]; finite for clusters without any mass."""
        return -(self.columns / self.columns.mean()).clamp_min(1e-30).log()

    def newton_step(self, derivative: Tensor, damping: float) -> Tensor:
        """The Newton step of v, [K]; `damping` adds a share of Sinkhorn-Knopp's diagonal.

        Sinkhorn-Knopp uses diag(columns) as the derivative, far too much where few images lie
        between clusters: with a small epsilon it takes hundreds of steps, Newton's method a handful.
        """
        mean = self.columns.mean()
        damped = derivative + torch.diag(damping * self.columns + 1e-6 * mean)
        step = torch.linalg.solve(damped, mean - self.columns)
        return step.clamp(-LONGEST_STEP, LONGEST_STEP)


@dataclass
class Assigned:
    """The hard assignment: cluster [n] int64, of this process's rows; the rest of all processes.

    features: [K, D] sums of the features of each cluster (hard), or weighted by Q (soft). sizes:
    [K] int64. similarity: mean cosine to the own centroid.
    """

    cluster: Tensor
    features: Tensor
    sizes: Tensor
    similarity: float


class Scores:
    """S / epsilon of all rows, for fixed centroids; a pass adds potentials v [K].

    Kept after the first pass if they take at most CACHE_BYTES, else computed anew.
    """

    def __init__(
        self,
        rows: Rows,
        centroids: Tensor,
        epsilon: float,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.rows, self.centroids, self.epsilon, self.on_pass = rows, centroids, epsilon, on_pass
        self.num_clusters = len(centroids)
        self.scaled = (centroids / epsilon).T.contiguous()
        fits = len(rows) * self.num_clusters * self.scaled.element_size() <= CACHE_BYTES
        self.cache = self.scaled.new_empty(len(rows), self.num_clusters) if fits else None
        self.cached = False

    def chunks(self, potentials: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice, scores [c, K]) of every chunk. The next chunk overwrites the scores."""
        buffer = self.scaled.new_empty(self.rows.chunk_size, self.num_clusters)
        for where in self.rows.chunks():
            score = buffer[: where.stop - where.start]
            kept = score if self.cache is None else self.cache[where]
            if not self.cached:
                torch.mm(self.rows.chunk(where), self.scaled, out=kept)
            yield where, torch.add(kept, potentials, out=score)
        self.cached = self.cache is not None
        self.on_pass()

    def masses(self, potentials: Tensor, *, derive: bool) -> Masses:
        """The masses under these potentials, with their derivative if `derive`; one pass."""
        every = max(1, self.rows.count // GRAM_ROWS)
        dtype = sum_dtype(self.rows.device)
        sums = self.rows.zeros(self.num_clusters + 1, self.num_clusters, dtype=dtype)
        for _, score in self.chunks(potentials):
            q = score.softmax(dim=1)
            sums[-1] += q.sum(dim=0)
            if derive:
                some = q[::every]
                sums[:-1] += some.T @ some
        sums = self.rows.all_reduce(sums).cpu().double()
        columns, gram = sums[-1], sums[:-1]
        if not derive:
            return Masses(columns, None)
        gram *= columns.sum() / gram.sum()  # rows of Q' sum to 1, so both are numbers of rows
        # For the same reason the derivative's columns sum to 0. Unlike a difference from the
        # masses, this is exact to rounding also where hardly any image lies between clusters.
        gram.fill_diagonal_(0)
        return Masses(columns, torch.diag(gram.sum(dim=0)) - gram)

    def assign(self, potentials: Tensor, *, soft: bool = False) -> Assigned:
        rows, dtype = self.rows, sum_dtype(self.rows.device)
        top = rows.zeros(len(rows))
        cluster = rows.zeros(len(rows), dtype=torch.int64)
        sums = rows.zeros(self.num_clusters, rows.width, dtype=dtype)
        for where, score in self.chunks(potentials):
            torch.max(score, dim=1, out=(top[where], cluster[where]))
            features = rows.chunk(where)
            if soft:
                sums += score.softmax(dim=1).T @ features
            else:
                sums += cluster_sums(features, cluster[where], self.num_clusters)
        sizes = rows.all_reduce(cluster.bincount(minlength=self.num_clusters))
        cosine = (top - potentials[cluster]).sum(dtype=dtype) * self.epsilon
        similarity = float(rows.all_reduce(cosine)) / max(1, rows.count)
        return Assigned(cluster, rows.all_reduce(sums), sizes, similarity)


def sum_dtype(device: torch.device | None) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def cluster_sums(features: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """Sums of the features [n, D] of each cluster, [K, D]; cluster: [n] int64.

    Rows sorted by cluster are bags of an embedding: several times faster than index_add, and added
    in a fixed order.
    """
    ordered, order = cluster.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_clusters, device=cluster.device))
    return embedding_bag(order, features, starts, mode="sum")


def balanced_potentials(
    scores: Scores, potentials: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, float]:
    """Improved `potentials` [K], and the largest relative error of a mass; one pass per step.

    Newton's method, its derivative renewed when a step did not help much. A step that did not help
    at all is replaced by a Sinkhorn-Knopp step, which never increases the sum of the errors, and
    damping grows. Ends within `tolerance`, or with the best potentials after `max_steps`.
    """
    best, current, damping = potentials, potentials, FIRST_DAMPING
    masses: Masses | None = None
    derivative: Tensor | None = None
    least, derive, sinkhorn = float("inf"), True, False
    for _ in range(max_steps):
        found = scores.masses(current, derive=derive)
        derivative = found.derivative if derive else derivative
        total = found.errors.sum().item()
        helped, derive = total < HELPFUL * least, total > FAST * least
        if masses is None or helped:
            best, masses, least = current, found, total
        elif sinkhorn:
            break  # the next step, and all that follow, would be this one again
        if masses.errors.max() <= tolerance:
            break
        damping = damping / 4 if helped else damping * 8
        sinkhorn = not helped or damping >= 1
        assert derivative is not None
        step = masses.sinkhorn_step() if sinkhorn else masses.newton_step(derivative, damping)
        current = best + step.to(best)
    assert masses is not None
    return best - best.mean(), masses.errors.max().item()
