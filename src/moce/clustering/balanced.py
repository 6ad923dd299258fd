"""Balanced k-means: alternate a Sinkhorn-Knopp assignment and an update of the centroids.

The hard update and a small epsilon are the defaults: with soft updates and epsilon 0.05,
centroids merge (4,000 points with 8 modes, K = 64: 12 distinct centroids were left).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor
from torch.nn.functional import normalize

from moce.clustering.sinkhorn import balance, chunks, scores
from moce.errors import MoceError

# While centroids still move, potentials carried over from the last round need few iterations.
ROUND_ITERATIONS, FINAL_ITERATIONS = 20, 1000
RESCUES = 5  # tries to fill clusters whose centroids have merged with others


@dataclass
class Clustering:
    """centroids: [K, D] unit; potentials: [K]; assignment: [n] int64; sizes: [K] int64; all of one fit."""

    centroids: Tensor
    potentials: Tensor
    assignment: Tensor
    sizes: Tensor
    rounds: int


def balanced_kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    epsilon: float = 0.01,
    update: str = "hard",
    tolerance: float = 1e-2,
    max_rounds: int = 50,
    settled: float = 5e-3,
    chunk_size: int = 65536,
    seed: int = 0,
    on_round: Callable[[int, float], None] = lambda round_, moved: None,
) -> Clustering:
    """Group unit features [n, D] into clusters of similar size.

    Rounds go on until at most the share `settled` of the images changes cluster. Copies of an
    image share its cluster, and count once in the fit: no split of them could be kept apart.
    Every cluster has an image and no two centroids are alike. Raises MoceError if there are
    fewer distinct images than clusters.
    """
    check_count(features.shape[0], num_clusters)
    everything, features = features, distinct(features)
    check_enough(features, num_clusters)
    centroids = seed_centroids(features, num_clusters, seed)
    potentials = features.new_zeros(num_clusters)
    assignment = torch.full((features.shape[0],), -1, device=features.device)
    for round_ in range(1, max_rounds + 1):
        potentials = balance(
            features, centroids, epsilon, potentials, tolerance, ROUND_ITERATIONS, chunk_size
        )
        previous = assignment
        assignment = assign(features, centroids, potentials, epsilon, chunk_size)
        moved = (assignment != previous).float().mean().item()
        on_round(round_, moved)
        empty = assignment.bincount(minlength=num_clusters) == 0
        if (moved <= settled and not empty.any()) or round_ == max_rounds:
            break
        if update == "hard":
            centroids = hard_centroids(features, assignment, centroids)
        else:
            centroids = soft_centroids(features, centroids, potentials, epsilon, chunk_size)
        centroids = reseed_empty(features, centroids, assignment)
        potentials = torch.where(empty, potentials.mean(), potentials)
    centroids, potentials = settle_potentials(
        features, centroids, potentials, epsilon, tolerance, chunk_size
    )
    assignment = assign(everything, centroids, potentials, epsilon, chunk_size)
    sizes = assignment.bincount(minlength=num_clusters)
    return Clustering(centroids, potentials, assignment, sizes, round_)


def settle_potentials(
    features: Tensor,
    centroids: Tensor,
    potentials: Tensor,
    epsilon: float,
    tolerance: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Balanced potentials under which no cluster is empty, and the centroids they are for.

    Centroids that have merged cannot be told apart by potentials: the empty ones move away first.
    Raises MoceError if clusters stay empty all the same.
    """
    for _ in range(RESCUES):
        potentials = balance(
            features, centroids, epsilon, potentials, tolerance, FINAL_ITERATIONS, chunk_size
        )
        filled = fill_empty(features, centroids, potentials, epsilon, chunk_size)
        if filled is not None:
            return centroids, filled
        assignment = assign(features, centroids, potentials, epsilon, chunk_size)
        centroids = reseed_empty(features, centroids, assignment)
    raise MoceError(
        f"cannot fill {len(centroids)} clusters: too many images are alike; use fewer clusters"
    )


def distinct(features: Tensor, chunk_size: int = 65536) -> Tensor:
    """The features without repeated rows, in their order; the tensor itself if none repeats.

    Rows are told apart by three random projections in float64: sorting those is cheap.
    """
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(features.shape[1], 3, generator=generator, dtype=torch.float64)
    projection = projection.to(features.device)
    keys = torch.cat(
        [features[part].double() @ projection for part in chunks(len(features), chunk_size)]
    )
    _, which = (keys * 1e6).round().unique(dim=0, return_inverse=True)
    first = torch.full((int(which.max()) + 1,), len(features), device=features.device)
    rows = torch.arange(len(features), device=features.device)
    first = first.scatter_reduce(0, which, rows, "amin").sort().values
    return features if len(first) == len(features) else features[first]


def check_count(count: int, num_clusters: int) -> None:
    """Raise MoceError if there are fewer images than clusters."""
    if count < num_clusters:
        raise MoceError(
            f"{num_clusters} clusters need as many images, and there are {count}; lower num_clusters"
        )


def check_enough(features: Tensor, num_clusters: int) -> None:
    """Raise MoceError unless there are at least `num_clusters` features, all finite."""
    if not torch.isfinite(features).all():
        raise MoceError("some image features are not finite; is the MAE run damaged?")
    if len(features) < num_clusters:
        raise MoceError(
            f"{num_clusters} clusters need as many distinct images, and there are "
            f"{len(features)}; lower num_clusters"
        )


def seed_centroids(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Distinct k-means++ seeds, [K, D], from a sample of at most 200 features per cluster."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(features), generator=generator)[: 200 * num_clusters].sort().values
    points = features[sample.to(features.device)].cpu().numpy()
    seeds, _ = kmeans_plusplus(points, num_clusters, random_state=seed)
    return torch.from_numpy(seeds).to(features)


def assign(
    features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float, chunk_size: int = 65536
) -> Tensor:
    """The cluster of every feature, [n] int64: argmax over clusters of Q."""
    parts = [
        scores(features[part], centroids, potentials, epsilon).argmax(dim=1)
        for part in chunks(features.shape[0], chunk_size)
    ]
    return torch.cat(parts)


def hard_centroids(features: Tensor, assignment: Tensor, previous: Tensor) -> Tensor:
    """Unit mean of the features assigned to each cluster; an empty one keeps its centroid."""
    sums = torch.zeros_like(previous).index_add_(0, assignment, features)
    return torch.where(sums.norm(dim=1, keepdim=True) > 1e-6, normalize(sums, dim=1), previous)


def soft_centroids(
    features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float, chunk_size: int
) -> Tensor:
    """Unit mean of all features weighted by Q."""
    sums = torch.zeros_like(centroids)
    for part in chunks(features.shape[0], chunk_size):
        q = scores(features[part], centroids, potentials, epsilon).softmax(dim=1)
        sums += q.T @ features[part]
    return normalize(sums, dim=1)


def reseed_empty(features: Tensor, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Move the centroid of every empty cluster to the worst-served image of a large cluster."""
    sizes = assignment.bincount(minlength=centroids.shape[0])
    fit = (features * centroids[assignment]).sum(dim=1)
    centroids = centroids.clone()
    for cluster in (sizes == 0).nonzero()[:, 0].tolist():
        members = (assignment == sizes.argmax()).nonzero()[:, 0]
        worst = members[fit[members].argmin()]
        centroids[cluster] = features[worst]
        sizes[assignment[worst]] -= 1
        sizes[cluster] = 1
        assignment = assignment.clone()
        assignment[worst] = cluster
    return centroids


def fill_empty(
    features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float, chunk_size: int
) -> Tensor | None:
    """Potentials raised just enough that no cluster is empty; None if that cannot be reached.

    Each empty cluster gets the image that costs it least, from a cluster with more than one.
    """
    potentials = potentials.clone()
    for _ in range(4 * len(potentials)):
        assignment = assign(features, centroids, potentials, epsilon, chunk_size)
        sizes = assignment.bincount(minlength=len(potentials))
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return potentials
        cluster = empty[0]
        gap = _gap(features, centroids, potentials, epsilon, cluster, chunk_size)
        gap[sizes[assignment] <= 1] = torch.inf
        potentials[cluster] += gap.min() * (1 + 1e-5) + 1e-4
    return None


def _gap(
    features: Tensor,
    centroids: Tensor,
    potentials: Tensor,
    epsilon: float,
    cluster: Tensor,
    size: int,
) -> Tensor:
    """By how much `cluster` loses each image to the image's own cluster, [n]."""
    parts = []
    for part in chunks(features.shape[0], size):
        score = scores(features[part], centroids, potentials, epsilon)
        parts.append(score.amax(dim=1) - score[:, cluster])
    return torch.cat(parts)
