"""MoCE: a masked autoencoder whose chosen FFNs are experts, routed by the image's cluster.

Source: arXiv 2402.05382. Read with gates.py (who decides) and experts.py (who works).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce.errors import MoceError
from moce.models.encoder import encode_tokens
from moce.models.experts import ExpertBlock, ExpertFFN, ExpertLayer, routings
from moce.models.gates import ClusterGate, balance_loss, imbalance_loss
from moce.models.mae import MAE, MAESpec
from moce.runtime.device import bincount


@dataclass(frozen=True)
class MoCESpec:
    """All that is needed to build a MoCE again, with weights to be loaded."""

    mae: MAESpec
    blocks: tuple[int, ...]
    num_experts: int
    num_clusters: int
    cluster_dim: int
    gate_scale: str = "straight_through"
    shared_gate: bool = False
    expert_scope: str = "ffn"

    def build(self) -> MoCE:
        mae = self.mae.build()
        gates = [torch.zeros(self.num_experts, self.cluster_dim)] * self.num_gates
        clusters = torch.zeros(self.num_clusters, self.cluster_dim)
        sizes = torch.ones(self.num_clusters)
        return MoCE(
            mae,
            self.blocks,
            gates,
            clusters,
            sizes,
            self.gate_scale,
            expert_scope=self.expert_scope,
        )

    @property
    def num_gates(self) -> int:
        return 1 if self.shared_gate else len(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoCESpec:
        parts = {"mae": MAESpec.from_dict(values["mae"]), "blocks": tuple(values["blocks"])}
        return cls(**{**values, **parts})


@dataclass
class MoCEOutput:
    """Scalars, and balance and imbalance summed over MoE blocks; prediction, removed as in MAE."""

    reconstruction: Tensor
    balance: Tensor
    imbalance: Tensor
    prediction: Tensor
    removed: Tensor


class MoCE(nn.Module):
    """`mae` with experts in `blocks`, gates over cluster embeddings, and the routing between them."""

    clusters: Tensor
    cluster_sizes: Tensor

    def __init__(
        self,
        mae: MAE,
        blocks: Sequence[int],
        gate_weights: Sequence[Tensor],
        clusters: Tensor,
        cluster_sizes: Tensor,
        gate_scale: str = "straight_through",
        balance_scope: str = "dataset",
        expert_scope: str = "ffn",
    ) -> None:
        """Turns `mae` into a mixture in place: pass a copy to keep the original.

        expert_scope: what an expert is, the block's FFN (ffn, the paper's) or the whole block.
        Raises MoceError for whole blocks under gate_scale prob, which no dense block could equal.

        gate_weights: one [E, D] per MoE block, or a single one shared by all; clusters: [K, D]
        unit embeddings; cluster_sizes: [K] images of each cluster in the training data.
        """
        super().__init__()
        if expert_scope == "block" and gate_scale != "straight_through":
            raise MoceError("experts that are whole blocks need gate_scale straight_through")
        self.mae = mae
        self.blocks = tuple(blocks)
        self.gate_scale = gate_scale
        self.balance_scope = balance_scope
        self.gates = nn.ModuleList(ClusterGate(weight) for weight in gate_weights)
        self.register_buffer("clusters", clusters.float().clone())
        self.register_buffer("cluster_sizes", cluster_sizes.float().clone())
        self.num_experts = gate_weights[0].shape[0]
        for layer in self.blocks:
            block: Any = mae.encoder.blocks[layer]
            if expert_scope == "block":
                mae.encoder.blocks[layer] = ExpertBlock(block, self.num_experts)
            else:
                block.mlp = ExpertFFN(block.mlp, self.num_experts)

    @property
    def experts(self) -> list[ExpertLayer]:
        """The expert layers, one per MoE block."""
        blocks = [cast(Any, self.mae.encoder.blocks[layer]) for layer in self.blocks]
        return [block if isinstance(block, ExpertBlock) else block.mlp for block in blocks]

    def tables(self, noise: Tensor | None = None) -> list[Tensor]:
        """One [K, E] table per MoE block. noise: [gates, K, E], or None for the clean tables."""
        made = [
            cast(ClusterGate, gate).table(self.clusters, None if noise is None else noise[index])
            for index, gate in enumerate(self.gates)
        ]
        return made * (len(self.blocks) // len(made))

    def routes(self) -> Tensor:
        """[K, blocks] int64: every cluster's expert in every MoE block, by the clean tables."""
        return torch.stack([table.argmax(dim=1) for table in self.tables()], dim=1)

    def gains(self) -> Tensor:
        """[K, blocks] float32: the value by which each cluster's experts' outputs are scaled."""
        return torch.stack([self._gate(table)[1] for table in self.tables()], dim=1)

    def _gate(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Every cluster's expert and the scale of its output, [K] each."""
        probability, expert = table.max(dim=1)
        if self.gate_scale == "straight_through":
            return expert, probability / probability.detach()  # value 1, gradient of log p
        return expert, probability

    @contextmanager
    def routed(self, clusters: Tensor, noise: Tensor | None = None) -> Iterator[None]:
        """Within the context the encoder computes for images of these clusters, [b] int64.

        The noisy tables decide route and scale.
        """
        chosen = [self._gate(table) for table in self.tables(noise)]
        made = routings(
            [expert[clusters] for expert, _ in chosen],
            [gate[clusters] for _, gate in chosen],
            self.num_experts,
        )
        for layer, routing in zip(self.experts, made, strict=True):
            layer.routing = routing
        try:
            yield
        finally:
            for layer in self.experts:
                layer.routing = None

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        clusters: Tensor,
        gate_noise: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> MoCEOutput:
        """images, noise: as in MAE; clusters: [b] int64; gate_noise: [gates, K, E].

        counts: [K] images of each cluster in the global batch (default: in this one). The gate
        losses are those of the global batch whatever part of it is passed, so that the average
        over micro-batches and ranks counts them once a step.
        """
        if counts is None:
            counts = bincount(clusters, self.clusters.shape[0])
        with self.routed(clusters, gate_noise):
            output = self.mae(images, noise)
        with torch.autocast(images.device.type, enabled=False):
            tables = self.tables()
            work = self.cluster_sizes if self.balance_scope == "dataset" else counts
            balance = torch.stack([balance_loss(table, work) for table in tables]).sum()
            imbalance = torch.stack([imbalance_loss(table, counts) for table in tables]).sum()
        return MoCEOutput(output.loss, balance, imbalance, output.prediction, output.removed)

    def features(self, images: Tensor, clusters: Tensor) -> Tensor:
        """Tokens of unmasked images after the final norm, [b, prefix + patches, width]."""
        with self.routed(clusters):
            return encode_tokens(self.mae.encoder, images)

    def dense_encoder(self, shares: Tensor, gains: Tensor) -> VisionTransformer:
        """A plain encoder whose FFNs (or blocks) are the experts averaged by `shares`, scaled by `gains`.

        shares: [blocks, E], rows sum to 1 (one-hot: that expert alone); gains: [blocks, E], the
        scale of each expert's output, folded into its last linear layer. With one-hot shares
        and the right gain it computes what the routed model computes.
        """
        # A memo tells deepcopy what to put in the place of an object: here, of expert layers.
        memo: dict[int, Any] = {
            id(layer): merge_experts(layer, share, gain)
            for layer, share, gain in zip(self.experts, shares, gains, strict=True)
        }
        return copy.deepcopy(self.mae.encoder, memo)


def merge_experts(layer: ExpertLayer, share: Tensor, gain: Tensor) -> nn.Module:
    """One FFN or block: the experts' parameters averaged by `share` [E], outputs scaled by `gain` [E].

    Gains of whole blocks are 1. Raises MoceError for a gain that an FFN of an unknown kind cannot
    take: one that does not end in a linear layer `fc2`, as all of timm's do.
    """
    if not hasattr(layer.experts[0], "fc2") and not torch.allclose(gain, torch.ones_like(gain)):
        kind = type(layer.experts[0]).__name__
        raise MoceError(f"an FFN of type {kind} cannot be scaled; train with straight_through")
    chosen = [index for index, weight in enumerate(share.tolist()) if weight > 0]
    merged = copy.deepcopy(layer.experts[chosen[0]])
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            scale = gain if name.startswith("fc2.") else torch.ones_like(gain)
            parameter.zero_()
            for index in chosen:
                weight = share[index].item() * scale[index].item()
                parameter.add_(layer.experts[index].get_parameter(name), alpha=weight)
    return merged


def default_blocks(depth: int) -> tuple[int, ...]:
    """The last two odd blocks, or the last one of a ViT with fewer than two (depth 12: 9 and 11)."""
    odd = tuple(range(1, depth, 2))[-2:]
    return odd or (depth - 1,)


def check_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """`blocks` sorted. Raises MoceError if one is missing from a ViT of this depth or named twice."""
    if not blocks or len(set(blocks)) < len(blocks) or not all(0 <= b < depth for b in blocks):
        raise MoceError(f"moe_blocks {list(blocks)} must be distinct numbers from 0 to {depth - 1}")
    return tuple(sorted(blocks))
