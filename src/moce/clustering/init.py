"""k-means++ and re-seeding of empty clusters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moce.clustering.features import Rows
from moce.clustering.sinkhorn import Scores

FLOOR = 1e-12  # added to squared distances, which may round to 0 near a seed


def draw(rows: Rows, distinct: int, count: int, seed: int) -> Tensor:
    """At most `count` of the distinct rows of all processes, [m] numbers in increasing order."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(distinct, generator=generator)[:count].sort().values
    if rows.weights is None:
        return drawn
    return rows.all_gather(rows.weights.cpu()).nonzero()[:, 0][drawn]


def plus_plus(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Greedy k-means++ seeds, [K, D], of unit points [m, D]: the best of a few draws for each.

    Draws by squared distance, 2 - 2 cos, in float64, and takes no point twice.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = points.cpu().double()
    trials = 2 + int(math.log(num_clusters))
    taken = torch.randint(len(wide), (1,), generator=generator)
    chosen = [int(taken)]
    nearest = _distance(wide, taken)[:, 0]
    for _ in range(num_clusters - 1):
        chances = nearest + FLOOR
        chances[chosen] = 0
        drawn = chances.multinomial(min(trials, len(wide) - len(chosen)), generator=generator)
        reached = torch.minimum(nearest[:, None], _distance(wide, drawn))
        best = int(reached.sum(dim=0).argmin())
        chosen.append(int(drawn[best]))
        nearest = reached[:, best]
    return points[chosen]


def _distance(points: Tensor, which: Tensor) -> Tensor:
    """1 - cos of unit points to some of them, [m, t]."""
    return (1 - points @ points[which].T).clamp_min_(0)


def reseed_empty(rows: Rows, centroids: Tensor, assignment: Tensor, sizes: Tensor) -> Tensor:
    """Move the centroid of every empty cluster to the worst-fitting image of a large cluster."""
    empty = (sizes == 0).nonzero()[:, 0].tolist()
    if not empty:
        return centroids
    similarity = _own_similarity(rows, centroids, assignment)
    assignment, sizes, centroids = assignment.clone(), sizes.clone(), centroids.clone()
    for cluster in empty:
        largest = int(sizes.argmax())
        _, worst = rows.min(similarity.where(assignment == largest, torch.inf))
        centroids[cluster] = rows.select(torch.tensor([worst]))[0]
        if rows.shard.start <= worst < rows.shard.stop:
            assignment[worst - rows.offset] = cluster
        sizes[largest] -= 1
        sizes[cluster] = 1
    return centroids


def _own_similarity(rows: Rows, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Cosine of every row to its cluster's centroid, [n] on the CPU; infinite for duplicates."""
    similarity = []
    for where in rows.chunks():
        own = centroids[assignment[where].long().to(centroids.device)]
        similarity.append((rows.chunk(where) * own).sum(dim=1))
    return rows.mask(torch.cat(similarity)).cpu()


def fill_empty(scores: Scores, potentials: Tensor) -> Tensor | None:
    """Raise potentials just enough that no cluster is empty; None if that is not possible.

    Each empty cluster gets the image that costs least, from a cluster with more than one.
    """
    potentials = potentials.clone()
    for _ in range(4 * len(potentials)):
        sizes = _sizes(scores, potentials)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return potentials
        gap = _least_gap(scores, potentials, int(empty[0]), sizes)
        potentials[empty[0]] += gap * (1 + 1e-5) + 1e-4
    return None


def _sizes(scores: Scores, potentials: Tensor) -> Tensor:
    """Distinct rows of each cluster, [K]."""
    rows = scores.rows
    sizes = rows.zeros(len(potentials))
    for where, _, score in scores.chunks(potentials):
        weights = rows.chunk_weights(where)
        sizes += torch.bincount(score.argmax(dim=1), weights, len(potentials))
    return rows.all_reduce(sizes)


def _least_gap(scores: Scores, potentials: Tensor, cluster: int, sizes: Tensor) -> float:
    """The least score that `cluster` lacks to win an image from a cluster with more than one."""
    gaps = []
    for _, _, score in scores.chunks(potentials):
        top, owner = score.max(dim=1)
        gaps.append((top - score[:, cluster]).masked_fill(sizes[owner] <= 1, torch.inf))
    return scores.rows.min(scores.rows.mask(torch.cat(gaps)))[0]
