"""MoCE: a masked autoencoder with experts in some blocks, routed by the image's cluster.

Source: arXiv 2402.05382. See gates.py for the gates and experts.py for the expert layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from moce.errors import MoceError
from moce.models.encoder import encode_tokens
from moce.models.experts import (
    ExpertBlock,
    ExpertFFN,
    ExpertLayer,
    MoEBlock,
    Routing,
    replace_ffn,
    routings,
)
from moce.models.gates import ClusterGate, balance_loss, imbalance_loss
from moce.models.mae import MAE, MAESpec
from moce.runtime.device import bincount


@dataclass(frozen=True)
class MoCESpec:
    """How to build a MoCE, whose weights are then loaded; stored in every run.

    blocks: numbers of the MoE blocks; cluster_dim: width of the cluster embeddings.
    """

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
        typed = {"mae": MAESpec.from_dict(values["mae"]), "blocks": tuple(values["blocks"])}
        return cls(**{**values, **typed})


@dataclass
class MoCEOutput:
    """Output of `MoCE`.

    reconstruction: scalar loss; balance, imbalance: scalar gate losses, summed over MoE blocks;
    prediction, removed: as in `Reconstruction`.
    """

    reconstruction: Tensor
    balance: Tensor
    imbalance: Tensor
    prediction: Tensor
    removed: Tensor


class MoCE(nn.Module):
    """A masked autoencoder with experts in some blocks and gates over cluster embeddings.

    The gates turn an image's cluster into the routing that the MoE blocks are called with.
    """

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
        balance_bound: float = 1.0,
    ) -> None:
        """Change `mae` into a mixture in place: pass a copy to keep the original.

        Args:
            mae: the trained masked autoencoder whose layers the experts copy.
            blocks: numbers of the encoder blocks that get experts.
            gate_weights: [E, D] per MoE block, or a single one that all blocks share.
            clusters: [K, D] unit embeddings.
            cluster_sizes: [K] training images per cluster.
            gate_scale: straight_through (outputs are scaled by 1) or prob (by the probability).
            balance_scope: weights of the balance loss: images per cluster in the dataset or in
                the batch.
            balance_bound: even shares of the work that an expert may have without balance loss.
            expert_scope: experts replace the block's ffn (the paper) or the whole block.

        Raises MoceError for whole blocks with gate_scale prob: no dense block could equal them.
        """
        super().__init__()
        if expert_scope == "block" and gate_scale != "straight_through":
            raise MoceError("experts that are whole blocks need gate_scale straight_through")
        self.mae = mae
        self.blocks = tuple(blocks)
        self.gate_scale = gate_scale
        self.balance_scope = balance_scope
        self.balance_bound = balance_bound
        self.gates = nn.ModuleList(ClusterGate(weight) for weight in gate_weights)
        self.register_buffer("clusters", clusters.float().clone())
        self.register_buffer("cluster_sizes", cluster_sizes.float().clone())
        self.num_experts = gate_weights[0].shape[0]
        for layer in self.blocks:
            block: Any = mae.encoder.blocks[layer]
            if expert_scope == "block":
                mae.encoder.blocks[layer] = ExpertBlock(block, self.num_experts)
            else:
                ffn = ExpertFFN(block.mlp, self.num_experts)
                mae.encoder.blocks[layer] = replace_ffn(block, ffn, MoEBlock)

    @property
    def experts(self) -> list[ExpertLayer]:
        """The expert layers, one per MoE block."""
        blocks = [cast(Any, self.mae.encoder.blocks[layer]) for layer in self.blocks]
        return [block if isinstance(block, ExpertBlock) else block.mlp for block in blocks]

    def tables(self, noise: Tensor | None = None) -> list[Tensor]:
        """One [K, E] table per MoE block. noise: [gates, K, E], or None for the clean tables."""
        tables = [
            cast(ClusterGate, gate).table(self.clusters, None if noise is None else noise[index])
            for index, gate in enumerate(self.gates)
        ]
        return tables * (len(self.blocks) // len(tables))

    def routes(self) -> Tensor:
        """[K, blocks] int64: the expert of every cluster in every MoE block, by the clean tables."""
        return torch.stack([table.argmax(dim=1) for table in self.tables()], dim=1)

    def gains(self) -> Tensor:
        """[K, blocks] float32: the scale of the expert's output for every cluster and MoE block."""
        return torch.stack([self._gate(table)[1] for table in self.tables()], dim=1)

    def _gate(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The expert of every cluster and the scale of its output, [K] each."""
        probability, expert = table.max(dim=1)
        if self.gate_scale == "straight_through":
            return expert, probability / probability.detach()  # value 1, gradient of log p
        return expert, probability

    def route(self, clusters: Tensor, noise: Tensor | None = None) -> dict[int, Routing]:
        """The routing of every MoE block, by its number, for images of these clusters, [b] int64.

        noise: [gates, K, E], added to the logits that decide expert and scale; None: clean gates.
        """
        chosen = [self._gate(table) for table in self.tables(noise)]
        found = routings(
            [expert[clusters] for expert, _ in chosen],
            [gate[clusters] for _, gate in chosen],
            self.num_experts,
        )
        return dict(zip(self.blocks, found, strict=True))

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        clusters: Tensor,
        gate_noise: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> MoCEOutput:
        """Losses of a batch.

        The gate losses are those of the global batch, whichever part of it is passed, so that
        their mean over micro-batches and processes counts them once per step.

        Args:
            images: as in `MAE`.
            noise: as in `MAE`.
            clusters: [b] int64, the cluster of every image.
            gate_noise: [gates, K, E] or None, as in `route`.
            counts: [K] images per cluster in the global batch (default: in this one).
        """
        if counts is None:
            counts = bincount(clusters, self.clusters.shape[0])
        output = self.mae(images, noise, self.route(clusters, gate_noise))
        with torch.autocast(images.device.type, enabled=False):
            tables = self.tables()
            work = self.cluster_sizes if self.balance_scope == "dataset" else counts
            balance = torch.stack(
                [balance_loss(table, work, self.balance_bound) for table in tables]
            ).sum()
            imbalance = torch.stack([imbalance_loss(table, counts) for table in tables]).sum()
        return MoCEOutput(output.loss, balance, imbalance, output.prediction, output.removed)

    def features(self, images: Tensor, clusters: Tensor) -> Tensor:
        """Tokens of unmasked images after the final norm, [b, prefix + patches, width]."""
        return encode_tokens(self.mae.encoder, images, routings=self.route(clusters))

    def dense_encoder(self, shares: Tensor, gains: Tensor) -> VisionTransformer:
        """A plain timm encoder in which every expert layer is replaced by a mean of its experts.

        With one-hot shares and the matching gains it computes what the routed model computes.

        Args:
            shares: [blocks, E], weights of the experts; rows sum to 1 (one-hot: that expert alone).
            gains: [blocks, E], scales of the experts' outputs, folded into their last linear layer.
        """
        encoder = self.mae.encoder
        # deepcopy takes an object's copy from the memo if it is there: here, the MoE blocks'.
        memo: dict[int, Any] = {}
        for number, layer, share, gain in zip(
            self.blocks, self.experts, shares, gains, strict=True
        ):
            block: Any = encoder.blocks[number]
            merged: Any = merge_experts(layer, share, gain)
            if isinstance(block, MoEBlock):
                merged = copy.deepcopy(replace_ffn(block, merged, Block))
            memo[id(block)] = merged
        return copy.deepcopy(encoder, memo)


def merge_experts(layer: ExpertLayer, share: Tensor, gain: Tensor) -> nn.Module:
    """One FFN or block whose parameters are the experts', averaged by `share` [E].

    gain: [E], scales of the experts' outputs, folded into `fc2`; 1 for whole blocks. Raises
    MoceError for another gain if the FFN does not end in a linear layer `fc2`, as all of timm's do.
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
    """`blocks` sorted. Raises MoceError if a ViT of this depth has no such block, or one is given twice."""
    if not blocks or len(set(blocks)) < len(blocks) or not all(0 <= b < depth for b in blocks):
        raise MoceError(f"moe_blocks {list(blocks)} must be distinct numbers from 0 to {depth - 1}")
    return tuple(sorted(blocks))
