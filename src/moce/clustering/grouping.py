"""Group clusters: what initial gates are made from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.balanced_kmeans import balanced_kmeans


def group_clusters(
    centroids: Tensor, num_groups: int, seed: int, *, projected: bool = True
) -> Tensor:
    """Group clusters [K, D] into groups of similar size, [K] int64: where a gate starts from.

    projected: the groups are those of a random projection to a quarter of the dimensions. On the
    centroids themselves every seed finds nearly the same groups, and with one split for all MoE
    blocks there would be only E routes.
    """
    if num_groups == 1:
        return torch.zeros(centroids.shape[0], dtype=torch.int64)
    points = centroids
    if projected:
        width = centroids.shape[1]
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(width, max(2, width // 4), generator=generator).to(centroids)
        points = normalize(centroids @ projection, dim=1)
    return balanced_kmeans(points, num_groups, seed=seed).assignment
