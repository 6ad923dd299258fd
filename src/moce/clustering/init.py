"""Where k-means starts: k-means++ on a sample, and new places for clusters that have become empty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moce.clustering.features import Rows
from moce.clustering.sinkhorn import Similarities

FLOOR = 1e-12  # chance of points so near to a seed that their distance is lost in rounding


def draw(rows: Rows, distinct: int, count: int, seed: int) -> Tensor:
    """At most `count` of the distinct rows of all processes, [m] numbers in increasing order."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(distinct, generator=generator)[:count].sort().values
    if rows.weights is None:
        return picked
    return rows.from_all(rows.weights.cpu()).nonzero()[:, 0][picked]


def plus_plus(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Greedy k-means++ seeds, [K, D], of unit points [m, D]: of a few draws the one that helps most.

    Drawn by squared distance, 2 - 2 cos, in float64; no point is taken twice.
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
    """Move the centroid of every empty cluster to the worst-served image of a large cluster."""
    empty = (sizes == 0).nonzero()[:, 0].tolist()
    if not empty:
        return centroids
    fit, owner, sizes = (
        own_similarity(rows, centroids, assignment),
        assignment.clone(),
        sizes.clone(),
    )
    centroids = centroids.clone()
    for cluster in empty:
        largest = int(sizes.argmax())
        _, worst = rows.least(fit.where(owner == largest, torch.inf))
        centroids[cluster] = rows.pick(torch.tensor([worst]))[0]
        if rows.own.start <= worst < rows.own.stop:
            owner[worst - rows.offset] = cluster
        sizes[largest] -= 1
        sizes[cluster] = 1
    return centroids


def own_similarity(rows: Rows, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Cosine of every row to the centroid of its cluster, [n] on the CPU; infinite for copies."""
    parts = []
    for part in rows.parts():
        own = centroids[assignment[part].long().to(centroids.device)]
        cosine = (rows.chunk(part) * own).sum(dim=1)
        parts.append(
            cosine if rows.weights is None else cosine.where(rows.weights[part] > 0, torch.inf)
        )
    return torch.cat(parts).cpu()


def fill_empty(similarities: Similarities, potentials: Tensor) -> Tensor | None:
    """Potentials raised just enough that no cluster is empty; None if that cannot be reached.

    Each empty cluster gets the image that costs it least, from a cluster with more than one.
    """
    potentials = potentials.clone()
    for _ in range(4 * len(potentials)):
        sizes = _sizes(similarities, potentials)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return potentials
        gap = _least_gap(similarities, potentials, int(empty[0]), sizes)
        potentials[empty[0]] += gap * (1 + 1e-5) + 1e-4
    return None


def _sizes(similarities: Similarities, potentials: Tensor) -> Tensor:
    """Distinct rows of each cluster, [K]."""
    rows = similarities.rows
    sizes = rows.zeros(len(potentials))
    for part, _, score in similarities.shifted(potentials, features=False):
        weights = None if rows.weights is None else rows.weights[part]
        sizes += torch.bincount(score.argmax(dim=1), weights, len(potentials))
    return rows.total(sizes)


def _least_gap(
    similarities: Similarities, potentials: Tensor, cluster: int, sizes: Tensor
) -> float:
    """By how little `cluster` loses an image to a cluster that has more than that one."""
    rows = similarities.rows
    parts = []
    for part, _, score in similarities.shifted(potentials, features=False):
        top, owner = score.max(dim=1)
        gap = (top - score[:, cluster]).masked_fill(sizes[owner] <= 1, torch.inf)
        parts.append(
            gap if rows.weights is None else gap.masked_fill(rows.weights[part] == 0, torch.inf)
        )
    return rows.least(torch.cat(parts))[0]
