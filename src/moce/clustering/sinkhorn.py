"""Balanced assignment by Sinkhorn-Knopp, in memory bounded by one chunk or a stated number of bytes.

Maximise Tr(Q^T S) + epsilon * H(Q) over Q >= 0 [n, K] whose rows sum to 1/n and columns to 1/K,
S the similarities of images and centroids. The solution is Q_ik = softmax_k(S_ik / epsilon + v_k) / n
for column potentials v, so v [K] is all that has to be kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moce.clustering.rows import CHUNK_SIZE, Rows

CACHE_BYTES = (
    2**31
)  # scores of all images that are kept, so that an iteration needs no matrix product


def scores(features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float) -> Tensor:
    """S / epsilon + v, [n, K]: its softmax is the assignment, its argmax the image's cluster."""
    return (features @ (centroids / epsilon).T).add_(potentials)


class Similarities:
    """S / epsilon of all rows and fixed centroids, chunk by chunk.

    keep: keep them for the next sweep, if they take at most CACHE_BYTES; results are the same.
    """

    def __init__(self, rows: Rows, centroids: Tensor, epsilon: float, *, keep: bool) -> None:
        self.rows, self.epsilon = rows, epsilon
        self.num_clusters = len(centroids)
        self._scaled = (centroids / epsilon).T.contiguous()
        self._buffer = rows.zeros(min(rows.chunk_size, len(rows)), self.num_clusters)
        bytes_needed = len(rows) * self.num_clusters * self._buffer.element_size()
        fits = keep and bytes_needed <= CACHE_BYTES
        self._kept = (
            torch.empty_like(self._buffer).new_empty(len(rows), self.num_clusters) if fits else None
        )
        self._ready = False

    def shifted(
        self, potentials: Tensor, *, features: bool
    ) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """(slice, features, S / epsilon + v) of every chunk; the last is overwritten by the next.

        features: whether they are needed; None is given where they are not at hand.
        """
        for part in self.rows.parts():
            known = self._ready and self._kept is not None
            chunk = self.rows.chunk(part) if features or not known else None
            score = self._buffer[: part.stop - part.start]
            if self._kept is None:
                torch.mm(chunk, self._scaled, out=score).add_(potentials)
            else:
                kept = self._kept[part]
                if not known:
                    torch.mm(chunk, self._scaled, out=kept)
                torch.add(kept, potentials, out=score)
            yield part, chunk, score
        self._ready = True

    def of_all(self) -> Similarities:
        """The same, with copies counted as all others."""
        other = copy(self)
        other.rows = replace(self.rows, weights=None)
        return other


@dataclass
class Sums:
    """What a sweep over all rows sums up, over all processes and in float64; copies do not count.

    mass: [K] column sums of n Q, whose mean is 1 when divided by n / K; features: [K, D] of the
    rows of each cluster (hard) or weighted by Q; sizes: [K] rows of each cluster; moved and
    similarity: share of rows that changed cluster, and mean cosine to the own centroid.
    """

    mass: Tensor
    features: Tensor
    sizes: Tensor
    moved: float
    similarity: float

    @property
    def excess(self) -> Tensor:
        """log of each cluster's mass over its due, [K]: what Sinkhorn-Knopp takes from v."""
        return log_excess(self.mass)

    @property
    def marginal_error(self) -> float:
        return error_of(self.excess)


def log_excess(mass: Tensor) -> Tensor:
    """log of mass over its mean. No mass at all counts as very little, so that steps stay finite."""
    return (mass / mass.mean()).clamp_min(1e-30).log()


def error_of(excess: Tensor) -> float:
    """The largest relative error of a cluster's mass."""
    return excess.exp().sub(1).abs().max().item()


def _wide(device: torch.device | None) -> torch.dtype:
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def column_mass(similarities: Similarities, potentials: Tensor) -> Tensor:
    """Column sums of n Q, [K] float64, over all rows."""
    rows = similarities.rows
    mass = rows.zeros(similarities.num_clusters, dtype=_wide(rows.device))
    for part, _, score in similarities.shifted(potentials, features=False):
        score.sub_(score.amax(dim=1, keepdim=True)).exp_()
        mass += _row_weights(rows, part, score) @ score
    return rows.total(mass)


def sweep(
    similarities: Similarities, potentials: Tensor, assignment: Tensor, *, soft: bool = False
) -> Sums:
    """One pass: assign every row (into `assignment`, [n] int32, in place) and sum up what rounds need."""
    rows, num_clusters = similarities.rows, similarities.num_clusters
    width = rows.features.shape[1]
    wide = _wide(rows.device)
    sums = rows.zeros(num_clusters, width + 2, dtype=wide)  # features, mass, size
    counts = rows.zeros(3, dtype=wide)  # rows, moved, similarity
    for part, chunk, score in similarities.shifted(potentials, features=True):
        assert chunk is not None
        weights = None if rows.weights is None else rows.weights[part]
        top, cluster = score.max(dim=1)
        score.sub_(top[:, None]).exp_()
        shares = _row_weights(rows, part, score)
        sums[:, width] += shares @ score
        sums[:, width + 1] += torch.bincount(cluster, weights, num_clusters)
        if soft:
            sums[:, :width] += score.mul_(shares[:, None]).T @ chunk
        else:
            sums[:, :width] += cluster_sums(chunk, cluster, num_clusters, weights)
        before = assignment[part].to(cluster.device)
        cosine = (top - potentials[cluster]) * similarities.epsilon
        each = torch.stack([torch.ones_like(top), (cluster != before).to(top), cosine])
        counts += each.sum(dim=1) if weights is None else each @ weights
        assignment[part] = cluster.to(assignment)
    rows.total(sums), rows.total(counts)
    moved, similarity = (counts[1:] / counts[0]).tolist()
    return Sums(sums[:, width], sums[:, :width], sums[:, width + 1], moved, similarity)


def _row_weights(rows: Rows, part: slice, exponentials: Tensor) -> Tensor:
    """What the exponentials of each row are multiplied with so that they sum to its weight, [c]."""
    norm = exponentials.sum(dim=1)
    return norm.reciprocal_() if rows.weights is None else rows.weights[part] / norm


def cluster_sums(
    features: Tensor, cluster: Tensor, num_clusters: int, weights: Tensor | None = None
) -> Tensor:
    """Sums of the features [n, D] of each cluster, [K, D]; clusters [n] int64.

    Rows sorted by cluster are bags of an embedding: several times as fast as index_add, and always
    added in the same order.
    """
    ordered, order = cluster.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_clusters, device=cluster.device))
    weights = None if weights is None else weights[order]
    return embedding_bag(order, features, starts, mode="sum", per_sample_weights=weights)


def balance(
    features: Tensor,
    centroids: Tensor,
    epsilon: float,
    potentials: Tensor | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 1000,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Column potentials v [K] at which every cluster gets the same mass.

    features: [n, D], centroids: [K, D], one floating dtype; `potentials` to start from. Stops when
    no column sum is further than `tolerance`, relatively, from 1/K; rows are exact throughout.
    """
    similarities = Similarities(
        Rows(features, chunk_size=chunk_size), centroids, epsilon, keep=True
    )
    start = features.new_zeros(len(centroids)) if potentials is None else potentials
    return balanced_potentials(similarities, start, tolerance, max_iterations)


def balanced_potentials(
    similarities: Similarities,
    potentials: Tensor,
    tolerance: float,
    max_iterations: int,
    on_sweep: Callable[[], None] = lambda: None,
) -> Tensor:
    """`balance` from similarities, which are computed once if they are kept."""
    current = potentials
    for _ in range(max_iterations):
        excess = log_excess(column_mass(similarities, current))
        on_sweep()
        if error_of(excess) <= tolerance:
            break
        current = current - excess.to(current)
    return current - current.mean()
