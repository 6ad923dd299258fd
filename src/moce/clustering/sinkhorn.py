"""Balanced assignment by Sinkhorn-Knopp in log space, in memory bounded by one chunk.

Maximise Tr(Q^T S) + epsilon * H(Q) over Q >= 0 [n, K] whose rows sum to 1/n and columns to 1/K,
S the similarities of images and centroids. The solution is Q_ik = softmax_k(S_ik / epsilon + v_k) / n
for column potentials v, so v [K] is all that has to be kept of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def scores(features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float) -> Tensor:
    """S / epsilon + v, [n, K]: its softmax is the assignment, its argmax the image's cluster."""
    return features @ centroids.T / epsilon + potentials


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def balance(
    features: Tensor,
    centroids: Tensor,
    epsilon: float,
    potentials: Tensor | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 1000,
    chunk_size: int = 65536,
) -> Tensor:
    """Column potentials v [K] at which every cluster gets the same mass.

    features: [n, D], centroids: [K, D], one floating dtype; `potentials` to start from. Stops when
    no column sum is further than `tolerance`, relatively, from 1/K; rows are exact throughout.
    """
    num_clusters = centroids.shape[0]
    current = features.new_zeros(num_clusters) if potentials is None else potentials
    for _ in range(max_iterations):
        error = log_column_sums(features, centroids, current, epsilon, chunk_size)
        error = error + math.log(num_clusters)  # log of (column sum * K)
        if error.exp().sub(1).abs().max() <= tolerance:
            break
        current = current - error
    return current - current.mean()


def log_column_sums(
    features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float, chunk_size: int
) -> Tensor:
    """log sum_i Q_ik, [K], for rows of Q that sum to 1/n."""
    total = features.new_full(potentials.shape, -math.inf)
    for part in chunks(features.shape[0], chunk_size):
        log_q = scores(features[part], centroids, potentials, epsilon).log_softmax(dim=1)
        total = torch.logaddexp(total, log_q.logsumexp(dim=0))
    return total - math.log(features.shape[0])
