"""Expert layers and MoE blocks: every image is computed by the expert that its routing names."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moce.runtime.device import bincount
from moce.runtime.distributed import world_size

B = TypeVar("B", bound=Block)


@dataclass
class Routing:
    """Where the images of a batch go in one MoE block.

    expert: [b] int64, the expert of every image; gate: [b] float32, the scale of its output;
    counts: images per expert, if already known.
    """

    expert: Tensor
    gate: Tensor
    counts: list[int] | None = None


class ExpertLayer(nn.Module):
    """Experts that start as copies of one layer (upcycling).

    Experts are separate modules. An expert without images in a step gets no gradient at all, so
    the optimizer skips it: neither momentum nor weight decay moves an idle expert.
    """

    def __init__(self, layer: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_experts))

    def _apply_routed(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Outputs of each image's expert, [b, n, d], and its gate, [b, 1, 1]."""
        outputs = apply_experts(self.experts, tokens, routing.expert, routing.counts)
        return outputs, routing.gate[:, None, None].to(outputs.dtype)


class ExpertFFN(ExpertLayer):
    """Replaces the FFN of a ViT block (the paper's experts)."""

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        """tokens: [b, n, d]. Returns gate * expert(tokens), [b, n, d]."""
        outputs, gate = self._apply_routed(tokens, routing)
        return outputs * gate


class ExpertBlock(ExpertLayer):
    """Replaces a whole ViT block: attention and norms belong to the experts, too."""

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        """tokens: [b, n, d]. Returns tokens + gate * (expert(tokens) - tokens), [b, n, d]."""
        outputs, gate = self._apply_routed(tokens, routing)
        return tokens + gate * (outputs - tokens)


class MoEBlock(Block):
    """A timm block whose FFN is an `ExpertFFN`; built by `replace_ffn`."""

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:  # type: ignore[override]
        """tokens: [b, n, d], of images that go where `routing` says. Returns [b, n, d]."""
        tokens = tokens + self.drop_path1(self.ls1(self.attn(self.norm1(tokens))))
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens), routing)))


def replace_ffn(block: Block, ffn: nn.Module, cls: type[B]) -> B:
    """A block of class `cls` with the layers of `block`, not copied, and another FFN.

    The layers keep their names and order, so the state dict's names outside the FFN stay the same.
    """
    made = cls.__new__(cls)
    nn.Module.__init__(made)  # not the block's own __init__, which would create new layers
    for name, layer in block.named_children():
        made.add_module(name, ffn if name == "mlp" else layer)
    made.training = block.training
    return made


def routings(experts: list[Tensor], gates: list[Tensor], num_experts: int) -> list[Routing]:
    """The routing of every MoE block, counts included. experts, gates: [b] per block.

    The CPU needs the counts, as sizes of the experts' slices, so it waits for the GPU: once for
    all blocks of a forward pass. Caching cannot avoid it, as routes change with the gates.
    """
    counts = torch.stack([bincount(expert, num_experts) for expert in experts]).tolist()
    return [Routing(*each) for each in zip(experts, gates, counts, strict=True)]


def apply_experts(
    experts: nn.ModuleList, rows: Tensor, expert: Tensor, counts: list[int] | None = None
) -> Tensor:
    """Every row by its own expert, in the order of the rows.

    Sorted by expert, each expert computes one contiguous slice: as cheap as a dense FFN. With
    several processes all experts compute in each process, if need be on no rows, because their
    gradients are averaged.

    Args:
        rows: [m, ...], images or tokens.
        expert: [m] int64, the expert of every row.
        counts: rows per expert. If None they are counted here, for which the CPU waits for a GPU.
    """
    order = expert.argsort(stable=True)
    sizes = bincount(expert, len(experts)).tolist() if counts is None else counts
    slices = rows.index_select(0, order).split(sizes)
    outputs = [
        layer(part)
        for layer, part in zip(experts, slices, strict=True)
        if part.shape[0] > 0 or world_size() > 1
    ]
    return torch.cat(outputs).index_select(0, order.argsort())


def divergence(layer: nn.Module) -> float:
    """How far the experts have moved apart: RMS distance from their mean over the mean's norm."""
    experts = cast(nn.ModuleList, layer.experts)
    vectors = torch.stack([nn.utils.parameters_to_vector(e.parameters()) for e in experts])
    center = vectors.detach().float().mean(dim=0)
    distance = (vectors.detach().float() - center).square().sum(dim=1).mean().sqrt()
    return (distance / center.norm()).item()
