"""From a task's images to a choice of experts: votes of routes, strategies, expert weights.

A route is a tuple of experts, one per MoE block. Every cluster takes one, so a histogram over
clusters is a vote among routes (arXiv 2402.05382, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moce.errors import MoceError

Route = tuple[int, ...]
FOREIGN = 2.0


@dataclass
class Choice:
    """The experts chosen for a task, and why.

    route: the winner; votes: images per route, most first; share: the winner's share of them;
    cluster_histogram: images per cluster; similarity: mean cosine similarity of the images to
    their centroids, training_similarity the training images' own; strategy: route, merge or
    generalist (never auto); shares, gains: [blocks, E], weight and output scale of every expert;
    gain_spread: standard deviation of the winner's scale over its clusters, per block (0: exact);
    scores: of strategy probe, every candidate's cross-validated score, 0..1.
    """

    route: Route
    votes: dict[Route, int]
    share: float
    cluster_histogram: list[int]
    similarity: float
    training_similarity: float
    strategy: str
    shares: list[list[float]]
    gains: list[list[float]]
    gain_spread: list[float]
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """How far the images lie from their centroids, in distances of the training images."""
        return (1 - self.similarity) / max(1 - self.training_similarity, 1e-6)

    @property
    def share_by_chance(self) -> tuple[float, float]:
        """The shares, of all such images, that these votes allow for: Wilson's interval at 95 %."""
        count, z = sum(self.votes.values()), 1.96
        middle = self.share + z**2 / (2 * count)
        reach = z * math.sqrt(self.share * (1 - self.share) / count + (z / (2 * count)) ** 2)
        low, high = ((middle + side * reach) / (1 + z**2 / count) for side in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def to_json(self) -> dict[str, Any]:
        """The choice as JSON values; routes as in 2-0."""
        votes = {route_name(route): count for route, count in self.votes.items()}
        return {**asdict(self), "route": list(self.route), "votes": votes}


def is_foreign(similarity: float, training_similarity: float) -> bool:
    """Whether a task's images are unlike those that the experts were trained on.

    They are if they lie further than `FOREIGN` times as far from their centroids as the training
    images do (cosine distances, on average). Specialists lose what they do not see, so such a task
    is better served by all experts averaged. The factor was set on development tasks and one seed
    (docs/log.md, 2026-11-25).
    """
    return 1 - similarity > FOREIGN * (1 - training_similarity)


def route_name(route: Route) -> str:
    """A route as users write it, such as 2-0."""
    return "-".join(map(str, route))


def choose(
    histogram: Tensor,
    routes: Tensor,
    gains: Tensor,
    sizes: Tensor,
    similarity: tuple[float, float],
    strategy: str = "auto",
    threshold: float = 0.9,
    num_experts: int | None = None,
) -> Choice:
    """Choose experts for a task.

    histogram: [K], the task's images per cluster; routes: [K, blocks] int64, the experts of every
    cluster; gains: [K, blocks], the scale of their outputs; sizes: [K], training images per
    cluster; similarity: of the task's and of the training images to their centroids; threshold:
    vote share from which strategy auto takes the winner; auto averages all experts for a
    foreign task; num_experts: E (default: as many as
    `routes` names). Raises MoceError if the histogram is empty, the strategy unknown or the
    threshold not in [0, 1].
    """
    if histogram.sum() == 0:
        raise MoceError("no images to choose experts by")
    if not 0 <= threshold <= 1:
        raise MoceError(f"threshold must be a share from 0 to 1, not {threshold}")
    votes = count_votes(histogram, routes)
    winner = next(iter(votes))
    share = votes[winner] / sum(votes.values())
    if strategy == "auto":
        strategy = "route" if share >= threshold else "merge"
        strategy = "generalist" if is_foreign(*similarity) else strategy
    cluster_weights = weigh_clusters(strategy, histogram, sizes, on_route(routes, winner))
    num_experts = num_experts or int(routes.max()) + 1
    shares, scale, spread = expert_weights(cluster_weights, routes, gains, num_experts)
    return Choice(
        route=winner,
        votes=votes,
        share=share,
        cluster_histogram=histogram.tolist(),
        similarity=similarity[0],
        training_similarity=similarity[1],
        strategy=strategy,
        shares=shares.tolist(),
        gains=scale.tolist(),
        gain_spread=spread.tolist(),
    )


def count_votes(histogram: Tensor, routes: Tensor) -> dict[Route, int]:
    """Images per route, most first, including routes without images.

    histogram: [K] images per cluster; routes: [K, blocks].
    """
    votes: dict[Route, int] = {}
    for route, count in zip(routes.tolist(), histogram.tolist(), strict=True):
        votes[tuple(route)] = votes.get(tuple(route), 0) + count
    return dict(sorted(votes.items(), key=lambda item: (-item[1], item[0])))


def on_route(routes: Tensor, route: Route) -> Tensor:
    """[K] bool: the clusters that take this route."""
    return (routes == torch.tensor(route, device=routes.device)).all(dim=1)


def weigh_clusters(strategy: str, histogram: Tensor, sizes: Tensor, winner: Tensor) -> Tensor:
    """The weight of every cluster, [K], by which a strategy averages their experts.

    winner: [K] bool, the clusters on the winning route. Raises MoceError for unknown strategies.
    """
    if strategy == "route":
        weights = histogram.double() * winner
        return weights if weights.sum() > 0 else sizes.double() * winner
    if strategy == "merge":
        return histogram.double()
    if strategy == "generalist":
        return sizes.double()
    raise MoceError(f"unknown strategy '{strategy}' (auto, route, merge or generalist)")


def expert_weights(
    cluster_weights: Tensor, routes: Tensor, gains: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts' shares [blocks, E], mean output scales [blocks, E] and the scales' spread [blocks].

    cluster_weights: [K]. A scale is the weighted mean over the clusters of the expert; the spread
    is their weighted standard deviation about it, over all clusters with weight.
    """
    weights = cluster_weights / cluster_weights.sum()
    takes = one_hot(routes, num_experts).double()  # [K, blocks, E]
    shares = torch.einsum("k,kbe->be", weights, takes)
    summed = torch.einsum("k,kb,kbe->be", weights, gains.double(), takes)
    scale = torch.where(shares > 0, summed / shares.clamp(min=1e-12), torch.ones_like(shares))
    own_scale = torch.einsum("kbe,be->kb", takes, scale)
    variance = torch.einsum("k,kb->b", weights, (gains.double() - own_scale).square())
    return shares, scale, variance.sqrt()
