"""One pass over all features: assignment, sums for the centroids, column masses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moce.clustering.features import Rows, chunks
from moce.clustering.sinkhorn import Masses, MassSum, Scores, sum_dtype
from moce.runtime.threads import num_worker_threads, run_in_threads

BLOCK = 1024  # rows whose scores are read again while they are in the processor's cache


@dataclass
class Sums:
    """Results of a pass, over all processes, in float64, without duplicates.

    features: [K, D] sums of the features of each cluster (hard), or weighted by Q (soft). sizes:
    [K] rows of each cluster. moved: share of rows that changed cluster. similarity: mean cosine to
    the own centroid.
    """

    masses: Masses
    features: Tensor
    sizes: Tensor
    moved: float
    similarity: float


def score_pass(
    scores: Scores,
    potentials: Tensor,
    assignment: Tensor,
    *,
    soft: bool = False,
    exact: bool = True,
) -> Sums:
    """Assign every row, in place of `assignment` [n] int32, and sum up what an iteration needs.

    exact: take the masses of all rows (soft sums always do), not of about MASS_ROWS of them.
    """
    work = _Pass(scores, potentials, soft=soft, exact=exact or soft)
    masses, features = work.run()
    rows, cluster = scores.rows, work.cluster
    cosine = (work.top - potentials[cluster]) * scores.epsilon
    moved = cluster != assignment.to(cluster.device)
    assignment.copy_(cluster)
    sizes, means = _statistics(
        rows, scores.num_clusters, cluster, torch.stack([moved.to(cosine), cosine])
    )
    rows.all_reduce(features)
    return Sums(masses.total(), features, sizes, *means)


class _Pass:
    """The work of a pass. top: [n] largest score of each row; cluster: [n] int64, where it is."""

    def __init__(self, scores: Scores, potentials: Tensor, *, soft: bool, exact: bool) -> None:
        self.scores, self.potentials, self.soft, self.exact = scores, potentials, soft, exact
        rows = scores.rows
        self.top = rows.zeros(len(rows))
        self.cluster = rows.zeros(len(rows), dtype=torch.int64)

    def run(self) -> tuple[MassSum, Tensor]:
        """Column masses, and sums of features [K, D], of all rows; in threads on the CPU."""
        shares = self._shares()
        if len(shares) == 1:
            return self._run(shares[0])
        with ThreadPoolExecutor(len(shares), "pass") as pool:
            results = run_in_threads(pool, lambda number: self._run(shares[number]), len(shares))
        (masses, features), *others = results
        for other_masses, other_features in others:
            masses.merge(other_masses)
            features += other_features
        return masses, features

    def _shares(self) -> list[slice]:
        """The rows of each thread, in whole chunks."""
        count, size = len(self.scores.rows), self.scores.rows.chunk_size
        threads = num_worker_threads() if self.scores.on_cpu else 1
        if threads == 1 or count == 0:
            return [slice(0, count)]
        return list(chunks(count, -(-count // (size * threads)) * size))

    def _run(self, share: slice) -> tuple[MassSum, Tensor]:
        rows, size = self.scores.rows, self.scores.rows.chunk_size
        masses = MassSum(self.scores, exact=self.exact)
        width, dtype = rows.features.shape[1], sum_dtype(rows.device)
        sums = rows.zeros(self.scores.num_clusters, width, dtype=dtype)
        block = min(BLOCK, size) if self.scores.on_cpu and masses.every > 1 else size
        for where, features, score in self.scores.chunks(self.potentials, block, share):
            torch.max(score, dim=1, out=(self.top[where], self.cluster[where]))
            factors = masses.add(where, score, self.top[where])
            if self.soft and factors is not None:
                features = rows.chunk(where) if features is None else features
                sums += score.mul_(factors[:, None]).T @ features
            elif where.stop % size == 0 or where.stop == share.stop:
                whole = slice((where.stop - 1) // size * size, where.stop)
                reusable = features is not None and whole == where
                sums += self._cluster_sums(whole, features if reusable else None)
        return masses, sums

    def _cluster_sums(self, where: slice, features: Tensor | None) -> Tensor:
        rows = self.scores.rows
        features = rows.chunk(where) if features is None else features
        weights = rows.chunk_weights(where)
        return cluster_sums(features, self.cluster[where], self.scores.num_clusters, weights)


def _statistics(
    rows: Rows, num_clusters: int, cluster: Tensor, values: Tensor
) -> tuple[Tensor, list[float]]:
    """Cluster sizes [K], and the means of `values` [m, n], over all processes, without duplicates."""
    weights, dtype = rows.weights, sum_dtype(rows.device)
    counted = None if weights is None else weights.to(dtype)  # float32 would stop at 2^24
    sizes = torch.bincount(cluster, counted, num_clusters).to(dtype)
    sums = (
        values.sum(dim=1, dtype=dtype) if weights is None else values.to(dtype) @ weights.to(dtype)
    )
    counts = torch.cat([sizes.sum()[None], sums])
    rows.all_reduce(sizes)
    rows.all_reduce(counts)
    return sizes, (counts[1:] / counts[0]).tolist()


def cluster_sums(
    features: Tensor, cluster: Tensor, num_clusters: int, weights: Tensor | None = None
) -> Tensor:
    """Sums of the features [n, D] of each cluster, [K, D]; cluster: [n] int64.

    Rows sorted by cluster are bags of an embedding: several times faster than index_add, and added
    in a fixed order.
    """
    ordered, order = cluster.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_clusters, device=cluster.device))
    weights = None if weights is None else weights[order]
    return embedding_bag(order, features, starts, mode="sum", per_sample_weights=weights)
