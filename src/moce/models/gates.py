"""Cluster-conditional gates: one float32 table of K clusters by E experts per MoE block.

A gate reads the embedding of an image's cluster, never a token (arXiv 2402.05382, section 3.2),
so it has K possible outputs: the whole gate is a table, computed once per step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClusterGate(nn.Module):
    """p = softmax(W c + noise) for every cluster embedding c. Always float32, never autocast."""

    def __init__(self, weight: Tensor) -> None:
        """weight: [E, D], the initial W."""
        super().__init__()
        # Fused optimizers read weights and moments as flat memory, so fix the layout.
        self.weight = nn.Parameter(weight.float().clone(memory_format=torch.contiguous_format))

    def table(self, clusters: Tensor, noise: Tensor | None = None) -> Tensor:
        """clusters: [K, D] unit embeddings; noise: [K, E] or None (the clean table). Returns [K, E]."""
        with torch.autocast(clusters.device.type, enabled=False):
            logits = clusters.float() @ self.weight.T
            return (logits if noise is None else logits + noise).softmax(dim=1)


def squared_cv(values: Tensor, dim: int = -1) -> Tensor:
    """Squared coefficient of variation, (population std / mean)^2, along `dim`."""
    mean = values.mean(dim=dim)
    return values.var(dim=dim, unbiased=False) / mean.square()


def balance_loss(table: Tensor, weights: Tensor, bound: float = 1.0) -> Tensor:
    """How far the experts' work is beyond the bound; CV^2 of it with bound 1 (section 3.2).

    With r the work of an expert over the mean, it is the mean of max(0, |r - 1| - (bound - 1))^2:
    no loss while no expert has more than `bound` even shares of the work. Related images stay
    together only if sizes may follow the data.

    table: [K, E] clean probabilities; weights: [K] images per cluster, of the batch or the data.
    """
    work = weights.to(table.dtype) @ table
    beyond = (work / work.mean() - 1).abs() - (bound - 1)
    return beyond.clamp(min=0).square().mean()


def imbalance_loss(table: Tensor, counts: Tensor) -> Tensor:
    """Minus the mean over images of CV^2 of their gate: -(E - 1) when every gate is one-hot.

    table: [K, E] clean probabilities; counts: [K] images of each cluster in the batch.
    """
    share = counts.to(table.dtype) / counts.sum()
    return -(share * squared_cv(table)).sum()


def random_gate(num_experts: int, width: int, std: float, generator: torch.Generator) -> Tensor:
    """Gate weights [E, D] drawn from N(0, std^2)."""
    return torch.randn(num_experts, width, generator=generator) * std


def gate_for(clusters: Tensor, groups: Tensor, num_experts: int, confidence: float) -> Tensor:
    """Gate weights [E, D] that route every group of clusters to its own expert.

    The weights are the least-squares solution for one-hot logits, scaled by bisection to the
    wanted confidence. (Rows along the groups' means, a simpler choice, route a cluster to the
    nearest mean, and left one of four experts with 6 % of the images.)

    Args:
        clusters: [K, D] unit embeddings.
        groups: [K] int64 in 0..E-1, the expert of every cluster.
        confidence: mean over clusters of the largest probability.
    """
    wanted = nn.functional.one_hot(groups, num_experts).double() - 1 / num_experts
    weight = (torch.linalg.pinv(clusters.double(), rtol=1e-3) @ wanted).T
    logits = clusters.double() @ weight.T
    low, high = 0.0, 1e4
    for _ in range(60):
        scale = (low + high) / 2
        too_low = (scale * logits).softmax(dim=1).amax(dim=1).mean() < confidence
        low, high = (scale, high) if too_low else (low, scale)
    return (weight * scale).float()
