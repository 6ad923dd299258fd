"""Where clusters start, and new places for empty ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.features import Rows

TRIALS = 8  # places that are tried for each cluster
FLOOR = 1e-6  # added to distances, which may round to 0 near a centroid


def balanced_seeds(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Unit centroids [K, D] of unit points [m, D]: k-means++ with clusters of even size.

    Draws a few points that are far from all centroids so far, forms a cluster of the m // K points
    that are nearest to each of them, keeps the tightest, and goes on without its points.
    """
    generator = torch.Generator().manual_seed(seed)
    points = points.cpu()
    size = len(points) // num_clusters
    centroids = points.new_empty(num_clusters, points.shape[1])
    free = torch.ones(len(points), dtype=torch.bool)
    nearest = points.new_ones(len(points))
    for number in range(num_clusters):
        chances = (nearest.clamp_min(0) + FLOOR) * free
        drawn = chances.multinomial(min(TRIALS, int(free.sum())), generator=generator)
        similarity = (points @ points[drawn].T).masked_fill_(~free[:, None], -torch.inf)
        tight = similarity.topk(size, dim=0)
        members = tight.indices[:, tight.values.sum(dim=0).argmax()]
        centroids[number] = normalize(points[members].mean(dim=0), dim=0)
        free[members] = False
        nearest = torch.minimum(nearest, 1 - points @ centroids[number])
    return centroids


def reseed_empty(rows: Rows, centroids: Tensor, cluster: Tensor, sizes: Tensor) -> Tensor:
    """Centroids, those of empty clusters moved to the worst-fitting row of a large cluster each.

    cluster: [n] int64, of this process's rows. sizes: [K] rows of all processes in each cluster.
    """
    empty = (sizes == 0).nonzero()[:, 0].tolist()
    if not empty:
        return centroids
    own = [(rows.chunk(w) * centroids[cluster[w]]).sum(dim=1) for w in rows.chunks()]
    similarity = rows.all_gather(torch.cat(own) if own else rows.zeros(0)).cpu()
    cluster, sizes = rows.all_gather(cluster).cpu(), sizes.clone()
    places = []
    for _ in empty:
        largest = int(sizes.argmax())
        places.append(int(similarity.where(cluster == largest, torch.inf).argmin()))
        similarity[places[-1]] = torch.inf  # not taken twice
        sizes[largest] -= 1
    moved = centroids.clone()
    moved[empty] = rows.select(torch.tensor(places))
    return moved
