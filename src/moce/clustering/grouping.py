"""Group clusters: what initial gates are made from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.balanced_kmeans import balanced_kmeans


def group_clusters(
    centroids: Tensor, num_groups: int, seed: int, *, projected: bool = True
) -> Tensor:
    """Groups of similar size of cluster centroids [K, D]: the group of each cluster, [K] int64.

    projected: group a random projection to a quarter of the dimensions. The centroids themselves
    give nearly the same groups for every seed, and one grouping for all MoE blocks would leave
    only E routes.
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
