"""Layers with several experts, one of which works on each whole image: FFNs, or whole blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moce.runtime.device import bincount
from moce.runtime.distributed import world_size


@dataclass
class Routing:
    """expert: [b] int64, the expert of every image; gate: [b] float32, the scale of its output.

    counts: images of every expert, if they have been counted.
    """

    expert: Tensor
    gate: Tensor
    counts: list[int] | None = None


class ExpertLayer(nn.Module):
    """Experts that start as copies of one layer, and the routing of the batch at hand.

    The encoder calls it with tokens alone, so the routing of the batch is set before (`routing`).
    Experts are separate modules. One without images in a step gets no gradient at all, so the
    optimizer leaves it where it is: neither momentum nor weight decay moves an idle expert.
    """

    OF_A_PASS = ("routing",)

    def __init__(self, layer: nn.Module, num_experts: int) -> None:
        """Experts start as copies of the trained `layer` (upcycling)."""
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_experts))
        self.routing: Routing | None = None

    def mixed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Every image by its expert, [b, n, d], and its gate, [b, 1, 1]. Raises if no routing is set."""
        if self.routing is None:
            raise RuntimeError("set .routing before calling an expert layer")
        routing = self.routing
        mixed = apply_experts(self.experts, tokens, routing.expert, routing.counts)
        return mixed, routing.gate[:, None, None].to(mixed.dtype)


class ExpertFFN(ExpertLayer):
    """Stands in for a ViT block's FFN (the paper's experts)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, n, d]. Returns gate * expert(tokens), [b, n, d]."""
        mixed, gate = self.mixed(tokens)
        return mixed * gate


class ExpertBlock(ExpertLayer):
    """Stands in for a whole ViT block: attention and norms, too, are each expert's own."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, n, d]. Returns tokens + gate * (expert(tokens) - tokens), [b, n, d]."""
        mixed, gate = self.mixed(tokens)
        return tokens + gate * (mixed - tokens)


def routings(experts: list[Tensor], gates: list[Tensor], num_experts: int) -> list[Routing]:
    """The routing of every MoE block, from [b] each, with its counts.

    Counts say how large each expert's slice is, so that the host has to know them, and a GPU is
    waited for: once for all blocks of a forward pass. It cannot be less: routes change with the
    gates, in every step.
    """
    counts = torch.stack([bincount(expert, num_experts) for expert in experts]).tolist()
    return [Routing(*each) for each in zip(experts, gates, counts, strict=True)]


def apply_experts(
    experts: nn.ModuleList, rows: Tensor, expert: Tensor, counts: list[int] | None = None
) -> Tensor:
    """Every row of `rows` [m, ...] by its own expert, `expert` [m] int64, in the rows' order.

    Sorted by expert, each one works on one contiguous slice: as cheap as a dense FFN. Of several
    processes all experts work in each, on no rows if need be: their gradients are averaged.

    counts: rows of each expert (default: counted here, for which a GPU is waited for).
    """
    order = expert.argsort(stable=True)
    sizes = bincount(expert, len(experts)).tolist() if counts is None else counts
    slices = rows.index_select(0, order).split(sizes)
    outputs = [
        work(part)
        for work, part in zip(experts, slices, strict=True)
        if part.shape[0] > 0 or world_size() > 1
    ]
    return torch.cat(outputs).index_select(0, order.argsort())


def divergence(layer: nn.Module) -> float:
    """How far experts have moved apart: RMS distance from their mean over the mean's norm."""
    experts = cast(nn.ModuleList, layer.experts)
    vectors = torch.stack([nn.utils.parameters_to_vector(e.parameters()) for e in experts])
    center = vectors.detach().float().mean(dim=0)
    distance = (vectors.detach().float() - center).square().sum(dim=1).mean().sqrt()
    return (distance / center.norm()).item()
