"""Sinkhorn-Knopp assignment, Newton steps for the potentials.

Maximize Tr(Q^T S) + epsilon * H(Q) over Q >= 0 [n, K] whose rows sum to 1/n and columns to 1/K,
S the cosine similarities of images and centroids. The solution is
Q_ik = softmax_k(S_ik / epsilon + v_k) / n, so the dual potentials v [K] are all that is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moce.clustering.features import Rows, chunks

GRAM_ROWS = 2**17  # rows that estimate the Hessian of a Newton step; fewer make it a poor one
MASS_ROWS = 2**16  # rows that estimate the column masses while centroids still move
FIRST_DAMPING, LONGEST_STEP = 0.1, 5.0
CACHE_BYTES = 2**31  # memory for the scores of all images, which saves the matrix product of a pass


class Scores:
    """S / epsilon + v of all rows for fixed centroids, chunk by chunk.

    cache: keep S / epsilon after the first whole pass if it takes at most CACHE_BYTES. Results are
    the same.
    """

    def __init__(self, rows: Rows, centroids: Tensor, epsilon: float, *, cache: bool) -> None:
        self.rows, self.epsilon = rows, epsilon
        self.num_clusters = len(centroids)
        self._scaled = (centroids / epsilon).T.contiguous()
        bytes_needed = len(rows) * self.num_clusters * self._scaled.element_size()
        fits = cache and bytes_needed <= CACHE_BYTES
        self._cache = self._scaled.new_empty(len(rows), self.num_clusters) if fits else None
        self._cached = False

    def chunks(
        self, potentials: Tensor, size: int | None = None, within: slice | None = None
    ) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """(slice, features, scores) of every chunk. The next chunk overwrites the scores.

        features: None if the scores came from the cache. size: rows of a chunk (default and most:
        the rows' chunk size). within: only these rows; several threads can each take a slice.
        """
        size = size or self.rows.chunk_size
        cached = self._cached  # of all rows, when this pass began
        buffer = self._scaled.new_empty(min(size, len(self.rows)), self.num_clusters)
        for where in self._slices(size, within):
            features = None if cached else self.rows.chunk(where)
            score = buffer[: where.stop - where.start]
            kept = score if self._cache is None else self._cache[where]
            if features is not None:
                torch.mm(features, self._scaled, out=kept)
            torch.add(kept, potentials, out=score)
            yield where, features, score
        self._cached = self._cached or (self._cache is not None and within is None)

    def _slices(self, size: int, within: slice | None) -> Iterator[slice]:
        """Slices of at most `size`; none reaches over the end of one of the rows' chunks."""
        for chunk in chunks(len(self.rows), self.rows.chunk_size, within):
            yield from chunks(len(self.rows), size, chunk)

    @property
    def on_cpu(self) -> bool:
        return self._scaled.device.type == "cpu"

    def with_duplicates(self) -> Scores:
        """The same scores with duplicates counted like all other rows."""
        other = copy(self)
        other.rows = replace(self.rows, weights=None)
        return other


@dataclass
class Masses:
    """Column sums of n Q over all processes, in float64, without duplicates.

    columns: [K] sums, all equal if balanced. gram: [K, K] Q'^T Q' of a sample of the rows, and
    sampled: [K] column sums of that sample; both scaled to all rows.
    """

    columns: Tensor
    gram: Tensor
    sampled: Tensor

    @property
    def excess(self) -> Tensor:
        """log of each cluster's mass over its target, [K]: Sinkhorn-Knopp subtracts it from v.

        Clamped, so that clusters without any mass give finite steps.
        """
        return (self.columns / self.columns.mean()).clamp_min(1e-30).log()

    @property
    def error(self) -> float:
        """The largest relative error of a cluster's mass."""
        return (self.columns / self.columns.mean() - 1).abs().max().item()

    @property
    def total_error(self) -> float:
        """Sum of the absolute relative errors; a Sinkhorn-Knopp step never increases it."""
        return (self.columns / self.columns.mean() - 1).abs().sum().item()

    def newton_step(self, damping: float) -> Tensor:
        """The Newton step of v, [K]; `damping` adds a share of Sinkhorn-Knopp's diagonal.

        The derivative of the column sums m by v is diag(m) - Q'^T Q'. Sinkhorn-Knopp uses diag(m)
        alone, far too much where few images lie between clusters: with a small epsilon it takes
        hundreds of steps, Newton's method a handful.
        """
        hessian = torch.diag(self.sampled) - self.gram
        hessian += torch.diag(damping * self.sampled + 1e-6 * self.sampled.mean())
        step = torch.linalg.solve(hessian, self.columns.mean() - self.columns)
        return step.clamp(-LONGEST_STEP, LONGEST_STEP)


class MassSum:
    """Accumulates Masses chunk by chunk: of all rows (exact), or of evenly spaced ones."""

    def __init__(self, scores: Scores, *, exact: bool) -> None:
        self.rows = scores.rows
        count, num_clusters = self.rows.count, scores.num_clusters
        self.every = 1 if exact else max(1, count // MASS_ROWS)
        gram_rows = GRAM_ROWS if exact else MASS_ROWS // 2
        self.gram_every = max(1, count // (gram_rows * self.every))
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        dtype = sum_dtype(self.rows.device)
        self.sums = self.rows.zeros(num_clusters + 2, num_clusters, dtype=dtype)

    def add(self, where: slice, score: Tensor, top: Tensor) -> Tensor | None:
        """Add a chunk of scores [c, K] with their row maxima [c].

        Exact: overwrites the scores with exp(score - top) and returns the factors [c] that make Q
        of them. Otherwise collects rows until they fill a chunk, and returns None.
        """
        weights = self.rows.chunk_weights(where)
        if self.every == 1:
            return self._sum(score.sub_(top[:, None]), weights)
        some = slice(None, None, self.every)
        pending = (score[some] - top[some, None], None if weights is None else weights[some])
        self._pending.append(pending)
        if sum(len(rows) for rows, _ in self._pending) >= self.rows.chunk_size:
            self._sum_pending()
        return None

    def _sum_pending(self) -> None:
        if self._pending:
            scores, weights = zip(*self._pending, strict=True)
            self._sum(torch.cat(scores), None if weights[0] is None else torch.cat(weights))
        self._pending = []

    def _sum(self, score: Tensor, weights: Tensor | None) -> Tensor:
        norm = score.exp_().sum(dim=1)
        factors = norm.reciprocal_() if weights is None else weights / norm
        self.sums[-1] += factors @ score
        some = score[:: self.gram_every] * factors[:: self.gram_every, None]
        self.sums[:-2] += some.T @ some
        self.sums[-2] += some.sum(dim=0)
        return factors

    def merge(self, other: MassSum) -> None:
        """Add the sums of another thread."""
        other._sum_pending()
        self.sums += other.sums

    def total(self) -> Masses:
        """The masses over all processes."""
        self._sum_pending()
        sums = self.rows.all_reduce(self.sums).cpu().double()
        scale = sums[-1].sum() / sums[-2].sum()
        return Masses(sums[-1], sums[:-2] * scale, sums[-2] * scale)


def sum_dtype(device: torch.device | None) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def column_masses(scores: Scores, potentials: Tensor) -> Masses:
    """Exact column sums of n Q; one pass."""
    masses = MassSum(scores, exact=True)
    for where, _, score in scores.chunks(potentials):
        masses.add(where, score, score.amax(dim=1))
    return masses.total()


def balanced_potentials(
    scores: Scores,
    potentials: Tensor,
    tolerance: float,
    max_steps: int,
    on_pass: Callable[[], None] = lambda: None,
) -> Tensor:
    """Improve `potentials` [K] until no mass is off by more than `tolerance`; one pass per step.

    Newton's method; a step that does not help is replaced by a Sinkhorn-Knopp step, and damping
    grows. After `max_steps` the best potentials so far, whatever their error.
    """
    best, damping = potentials, FIRST_DAMPING
    masses: Masses | None = None
    current, sinkhorn = potentials, False
    for _ in range(max_steps):
        found = column_masses(scores, current)
        on_pass()
        helped = masses is None or found.total_error < masses.total_error
        if masses is None or helped:
            best, masses = current, found
        elif sinkhorn:
            break  # the next step, and all that follow, would be this one again
        if masses.error <= tolerance:
            break
        damping = damping / 4 if helped else damping * 8
        sinkhorn = not helped or damping >= 1
        step = -masses.excess if sinkhorn else masses.newton_step(damping)
        current = best + step.to(best)
    return best - best.mean()
