"""Balanced assignment by Sinkhorn-Knopp, in memory of a chunk per thread, 40 bytes a row and a stated cache.

Maximize Tr(Q^T S) + epsilon * H(Q) over Q >= 0 [n, K] whose rows sum to 1/n and columns to 1/K,
S the similarities of images and centroids. The solution is Q_ik = softmax_k(S_ik / epsilon + v_k) / n
for column potentials v, so v [K] is all that has to be kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moce.clustering.features import CHUNK_SIZE, Rows, chunks
from moce.runtime.threads import num_worker_threads, run_in_threads

T = TypeVar("T")

GRAM_ROWS = 2**17  # rows from which a step of Newton's method is reckoned: few make it a poor one
MASS_ROWS = 2**16  # rows, or more, whose masses stand for all while centroids still move
FIRST_DAMPING, LONGEST_STEP = 0.1, 5.0
BLOCK = 1024  # rows whose scores are looked at while they are in the cache
CACHE_BYTES = 2**31  # scores of all images that are kept, so that iterations need no product


class Similarities:
    """S / epsilon of all rows and fixed centroids, chunk by chunk.

    keep: keep them once they are computed in one go (`column_masses` does), if they take at most
    CACHE_BYTES; results are the same.
    """

    def __init__(self, rows: Rows, centroids: Tensor, epsilon: float, *, keep: bool) -> None:
        self.rows, self.epsilon = rows, epsilon
        self.num_clusters = len(centroids)
        self._scaled = (centroids / epsilon).T.contiguous()
        bytes_needed = len(rows) * self.num_clusters * self._scaled.element_size()
        fits = keep and bytes_needed <= CACHE_BYTES
        self._kept = self._scaled.new_empty(len(rows), self.num_clusters) if fits else None
        self._ready = False

    def shifted(
        self,
        potentials: Tensor,
        *,
        features: bool,
        size: int | None = None,
        within: slice | None = None,
    ) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """(slice, features, S / epsilon + v) of every chunk; the last is overwritten by the next.

        features: whether they are needed; None is given where they are not at hand. size: of the
        chunks, at most that of the rows' (default: that). within: only these of the rows, for one
        thread of several that have all of them; the others' are not overwritten.
        """
        size = size or self.rows.chunk_size
        known = self._ready and self._kept is not None  # of all rows, when this began
        buffer = self._scaled.new_empty(min(size, len(self.rows)), self.num_clusters)
        for part in self._blocks(size, within):
            chunk = self.rows.chunk(part) if features or not known else None
            score = buffer[: part.stop - part.start]
            if self._kept is None:
                assert chunk is not None
                torch.mm(chunk, self._scaled, out=score).add_(potentials)
            else:
                kept = self._kept[part]
                if not known:
                    assert chunk is not None
                    torch.mm(chunk, self._scaled, out=kept)
                torch.add(kept, potentials, out=score)
            yield part, chunk, score
        self._ready = self._ready or within is None

    def _blocks(self, size: int, within: slice | None) -> Iterator[slice]:
        """Slices of at most `size` of each chunk in turn: none is of two chunks."""
        for chunk in chunks(len(self.rows), self.rows.chunk_size, within):
            yield from chunks(len(self.rows), size, chunk)

    @property
    def on_cpu(self) -> bool:
        return self._scaled.device.type == "cpu"

    def of_all(self) -> Similarities:
        """The same, with copies counted as all others."""
        other = copy(self)
        other.rows = replace(self.rows, weights=None)
        return other


@dataclass
class Masses:
    """What n Q sums up to, over all processes and in float64; copies do not count.

    columns: [K] column sums; their due is the same for all. gram: [K, K], Q'^T Q' over a sample of
    the rows, and sampled: [K] the column sums of that sample, scaled to the whole.
    """

    columns: Tensor
    gram: Tensor
    sampled: Tensor

    @property
    def excess(self) -> Tensor:
        """log of each cluster's mass over its due, [K]: what Sinkhorn-Knopp takes from v.

        No mass at all counts as very little, so that steps stay finite.
        """
        return (self.columns / self.columns.mean()).clamp_min(1e-30).log()

    @property
    def error(self) -> float:
        """The largest relative error of a cluster's mass."""
        return (self.columns / self.columns.mean() - 1).abs().max().item()

    @property
    def misplaced(self) -> float:
        """Sum of the absolute relative errors: an iteration of Sinkhorn-Knopp never raises it."""
        return (self.columns / self.columns.mean() - 1).abs().sum().item()

    def newton_step(self, damping: float) -> Tensor:
        """What to add to v by Newton's method, [K]; damped by a share of what Sinkhorn-Knopp divides by.

        The column sums m change with v by diag(m) - Q'^T Q'. Sinkhorn-Knopp takes diag(m) for it,
        which is far too much where few images are between clusters: with a small epsilon it needs
        hundreds of iterations, Newton's method a handful.
        """
        change = torch.diag(self.sampled) - self.gram
        change += torch.diag(damping * self.sampled + 1e-6 * self.sampled.mean())
        step = torch.linalg.solve(change, self.columns.mean() - self.columns)
        return step.clamp(-LONGEST_STEP, LONGEST_STEP)


class _Adder:
    """Sums of Q over the chunks of a sweep; exact, or over some of the rows, evenly spread."""

    def __init__(self, similarities: Similarities, *, exact: bool) -> None:
        rows, num_clusters = similarities.rows, similarities.num_clusters
        self.rows = rows
        self.step = 1 if exact else max(1, rows.count // MASS_ROWS)
        gram_rows = GRAM_ROWS if exact else MASS_ROWS // 2
        self.stride = max(1, rows.count // (gram_rows * self.step))
        self._aside: list[Tensor] = []
        self._weights: list[Tensor] = []
        self.sums = rows.zeros(num_clusters + 2, num_clusters, dtype=_wide(rows.device))

    def add(self, part: slice, score: Tensor, top: Tensor) -> Tensor | None:
        """Turn scores [c, K] less their row's maximum into exponentials, in place; the rows' factors.

        Not exact, some rows are put aside, until there are enough to be worth the trouble.
        """
        weights = None if self.rows.weights is None else self.rows.weights[part]
        if self.step == 1:
            return self._sum(score.sub_(top[:, None]), weights)
        some = score[:: self.step]
        self._aside.append(some - top[:: self.step, None])
        if weights is not None:
            self._weights.append(weights[:: self.step])
        if sum(map(len, self._aside)) >= self.rows.chunk_size:
            self._sum_aside()
        return None

    def _sum_aside(self) -> None:
        if self._aside:
            self._sum(torch.cat(self._aside), torch.cat(self._weights) if self._weights else None)
        self._aside, self._weights = [], []

    def _sum(self, score: Tensor, weights: Tensor | None) -> Tensor:
        """Add rows of scores, 0 at most; they are turned into exponentials."""
        norm = score.exp_().sum(dim=1)
        factors = norm.reciprocal_() if weights is None else weights / norm
        self.sums[-1] += factors @ score
        some = score[:: self.stride] * factors[:: self.stride, None]
        self.sums[:-2] += some.T @ some
        self.sums[-2] += some.sum(dim=0)
        return factors

    def join(self, other: _Adder) -> None:
        """Add what another has summed up of the same similarities."""
        other._sum_aside()
        self.sums += other.sums

    def total(self) -> Masses:
        self._sum_aside()
        sums = self.rows.total(self.sums).cpu().double()
        scale = sums[-1].sum() / sums[-2].sum()
        return Masses(sums[-1], sums[:-2] * scale, sums[-2] * scale)


@dataclass
class Sums:
    """What a sweep over all rows sums up, over all processes and in float64; copies do not count.

    features: [K, D] of the rows of each cluster (hard) or weighted by Q; sizes: [K] rows of each
    cluster; moved and similarity: share of rows that changed cluster, and mean cosine to the own
    centroid.
    """

    masses: Masses
    features: Tensor
    sizes: Tensor
    moved: float
    similarity: float


def _wide(device: torch.device | None) -> torch.dtype:
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def column_masses(similarities: Similarities, potentials: Tensor) -> Masses:
    """Column sums of n Q, and how they change with the potentials."""
    adder = _Adder(similarities, exact=True)
    for part, _, score in similarities.shifted(potentials, features=False):
        adder.add(part, score, score.amax(dim=1))
    return adder.total()


def score_pass(
    similarities: Similarities,
    potentials: Tensor,
    assignment: Tensor,
    *,
    soft: bool = False,
    exact: bool = True,
) -> Sums:
    """One pass: assign every row (into `assignment`, [n] int32, in place) and sum up what rounds need.

    exact: whether the masses are of all rows (as soft sums need) or of MASS_ROWS or more of them.
    """
    rows, num_clusters = similarities.rows, similarities.num_clusters
    top, cluster = rows.zeros(len(rows)), rows.zeros(len(rows), dtype=torch.int64)

    def worker(own: slice) -> tuple[_Adder, Tensor]:
        return _swept(similarities, potentials, own, top, cluster, soft=soft, exact=exact)

    (adder, features), *others = _in_threads(similarities, worker)
    for other, its_features in others:
        adder.join(other)
        features += its_features
    cosine = (top - potentials[cluster]) * similarities.epsilon
    moved = cluster != assignment.to(cluster.device)
    assignment.copy_(cluster)
    sizes, counts = _tallies(rows, num_clusters, cluster, torch.stack([moved.to(cosine), cosine]))
    rows.total(features)
    share_moved, similarity = (counts[1:] / counts[0]).tolist()
    return Sums(adder.total(), features, sizes, share_moved, similarity)


def _in_threads(similarities: Similarities, worker: Callable[[slice], T]) -> list[T]:
    """What `lane` returns for each of the slices that threads of the CPU take; elsewhere for all rows."""
    rows = similarities.rows
    count = num_worker_threads() if similarities.on_cpu else 1
    each = -(-len(rows) // (rows.chunk_size * count)) * rows.chunk_size
    parts = list(chunks(len(rows), each)) if count > 1 and len(rows) else [slice(0, len(rows))]
    if len(parts) == 1:
        return [worker(parts[0])]
    with ThreadPoolExecutor(len(parts), "lane") as pool:
        return run_in_threads(pool, lambda number: worker(parts[number]), len(parts))


def _swept(
    similarities: Similarities,
    potentials: Tensor,
    own: slice,
    top: Tensor,
    cluster: Tensor,
    *,
    soft: bool,
    exact: bool,
) -> tuple[_Adder, Tensor]:
    """The sums of Q and of features [K, D] over rows `own`; their largest score and its place are filled in."""
    rows, num_clusters, size = (
        similarities.rows,
        similarities.num_clusters,
        similarities.rows.chunk_size,
    )
    adder = _Adder(similarities, exact=exact or soft)
    features = rows.zeros(num_clusters, rows.features.shape[1], dtype=_wide(rows.device))
    block = min(BLOCK, size) if similarities.on_cpu and adder.step > 1 else size
    for part, chunk, score in similarities.shifted(
        potentials, features=True, size=block, within=own
    ):
        assert chunk is not None
        torch.max(score, dim=1, out=(top[part], cluster[part]))
        factors = adder.add(part, score, top[part])
        if soft and factors is not None:
            features += score.mul_(factors[:, None]).T @ chunk
        elif part.stop % size == 0 or part.stop == own.stop:
            whole = slice((part.stop - 1) // size * size, part.stop)
            weights = None if rows.weights is None else rows.weights[whole]
            chunk = chunk if whole == part else rows.chunk(whole)
            features += cluster_sums(chunk, cluster[whole], num_clusters, weights)
    return adder, features


def _tallies(
    rows: Rows, num_clusters: int, cluster: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Over all processes and without copies: sizes of the clusters, and rows and sums of `values` [m, n]."""
    weights, wide = rows.weights, _wide(rows.device)
    counted = None if weights is None else weights.to(wide)  # float32 would stop at 2^24
    sizes = torch.bincount(cluster, counted, num_clusters).to(wide)
    sums = values.sum(dim=1, dtype=wide) if weights is None else values.to(wide) @ weights.to(wide)
    counts = torch.cat([sizes.sum()[None], sums])
    return rows.total(sizes), rows.total(counts)


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
    """`balance` from similarities, which are computed once if they are kept.

    Newton's method; where a step of it does not help, an iteration of Sinkhorn-Knopp in its place
    and more damping. After `max_iterations` the best so far, whatever its error.
    """
    best, damping = potentials, FIRST_DAMPING
    masses: Masses | None = None
    current = potentials
    for _ in range(max_iterations):
        found = column_masses(similarities, current)
        on_sweep()
        helped = masses is None or found.misplaced < masses.misplaced
        if masses is None or helped:
            best, masses = current, found
        if masses.error <= tolerance:
            break
        damping = damping / 4 if helped else damping * 8
        sinkhorn = not helped or damping >= 1
        step = -masses.excess if sinkhorn else masses.newton_step(damping)
        current = best + step.to(best)
    return best - best.mean()
