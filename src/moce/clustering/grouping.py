"""Group clusters by meaning: what initial gates, and `moce headroom`, are made from."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import ClusterNode, linkage, to_tree
from torch import Tensor


def group_clusters(centroids: Tensor, sizes: Tensor, num_groups: int, bound: float = 2.0) -> Tensor:
    """Groups of related clusters, [K] int64, numbered from the largest: a cut through Ward's tree.

    The tree is cut from the top. A group with more than `bound` even shares of the images is
    split first; otherwise the group whose halves are furthest apart (Ward's distance). So sizes
    follow the data, within a bound, and related clusters stay together. A bound cannot be kept
    where a single cluster exceeds it.

    Every dimension counts alike: else the few of largest variance decide, which are not those that
    tell domains from each other (docs/log.md).

    Args:
        centroids: [K, D] unit embeddings of the clusters.
        sizes: [K] images of each cluster.
        num_groups: at most K.
        bound: most images of a group, in even shares (1 / num_groups of all images).
    """
    if len(centroids) == 1:
        return torch.zeros(1, dtype=torch.int64)
    shares = sizes.double().cpu().numpy() / float(sizes.sum())
    share = lambda node: shares[node.pre_order()].sum()  # noqa: E731
    groups = [to_tree(linkage(_standardized(centroids, sizes), method="ward"))]
    while len(groups) < num_groups:
        splittable = [group for group in groups if not group.is_leaf()]
        too_large = [group for group in splittable if share(group) > bound / num_groups]
        chosen = max(too_large, key=share) if too_large else max(splittable, key=_distance)
        groups.remove(chosen)
        groups += [chosen.left, chosen.right]
    return _numbered(sorted(groups, key=share, reverse=True), len(centroids))


def _standardized(centroids: Tensor, sizes: Tensor) -> np.ndarray:
    """Centroids of zero mean and unit deviation over all images, in every dimension that varies."""
    points, weights = centroids.double().cpu().numpy(), sizes.double().cpu().numpy()
    points = points - np.average(points, axis=0, weights=weights)
    deviation = np.sqrt(np.average(points**2, axis=0, weights=weights))
    return points / np.where(deviation > 1e-9, deviation, 1.0)


def _distance(node: ClusterNode) -> float:
    return float(node.dist)


def _numbered(groups: list[ClusterNode], num_clusters: int) -> Tensor:
    group_of = np.zeros(num_clusters, dtype=np.int64)
    for number, group in enumerate(groups):
        group_of[group.pre_order()] = number
    return torch.from_numpy(group_of)
