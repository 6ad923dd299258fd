"""TokenMoE, the baseline: the same experts in the same blocks, but the gate reads each token.

As V-MoE (arXiv 2106.05974) with k = 1: noise N(0, 1/E^2) on the logits in training, importance and
load losses of half the weight each, experts that start as copies. A token's gate sees colors and
edges, not what the image is about, so such a model cannot be made dense for a task: it is handed
on with all its experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce.models.experts import apply_experts
from moce.models.gates import squared_cv
from moce.models.mae import MAE, MAESpec
from moce.runtime.distributed import all_reduce_autograd


@dataclass(frozen=True)
class TokenMoESpec:
    """All that is needed to build a TokenMoE again, with weights to be loaded."""

    mae: MAESpec
    blocks: tuple[int, ...]
    num_experts: int
    gate_scale: str = "straight_through"

    def build(self) -> TokenMoE:
        return TokenMoE(self.mae.build(), self.blocks, self.num_experts, self.gate_scale)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenMoESpec:
        parts = {"mae": MAESpec.from_dict(values["mae"]), "blocks": tuple(values["blocks"])}
        return cls(**{**values, **parts})


class TokenExpertFFN(nn.Module):
    """Stands in for a ViT block's FFN: every token goes to the expert its own gate picks."""

    OF_A_PASS = ("balance", "noise")

    def __init__(
        self, ffn: nn.Module, width: int, num_experts: int, gate_scale: str, gate_std: float = 0.02
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(num_experts))
        self.gate = nn.Parameter(torch.randn(num_experts, width) * gate_std)
        self.gate_scale = gate_scale
        self.balance: Tensor | None = None  # of the last training pass
        self.noise: Tensor | None = None  # N(0, 1) of the next one; None: it draws its own

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, n, d]. Returns [b, n, d], and leaves the balance loss in `balance`."""
        rows = tokens.flatten(0, 1)
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 logits flip choices
            clean = rows.float() @ self.gate.float().T
            deviation = 1 / len(self.experts)
            noisy = clean
            if self.training:
                drawn = torch.randn_like(clean) if self.noise is None else self.noise.view_as(clean)
                noisy = clean + drawn * deviation
                self.balance = token_balance(clean, noisy, deviation)
            probability, expert = noisy.softmax(dim=1).max(dim=1)
        if self.gate_scale == "straight_through":
            probability = probability / probability.detach()
        mixed = apply_experts(self.experts, rows, expert)
        return (mixed * probability[:, None].to(mixed.dtype)).view_as(tokens)


def token_balance(clean: Tensor, noisy: Tensor, deviation: float) -> Tensor:
    """Mean of V-MoE's importance and load losses (its section A.2). clean, noisy: logits [m, E].

    Importance: CV^2 of the summed probabilities. Load: CV^2 of the summed chances that each
    expert would be chosen if its noise were drawn again, a smooth count of its tokens. Both sums
    are over the tokens of all processes.
    """
    importance = squared_cv(all_reduce_autograd(clean.softmax(dim=1).sum(dim=0)))
    needed = noisy.amax(dim=1, keepdim=True) - clean
    load = squared_cv(all_reduce_autograd(torch.special.ndtr(-needed / deviation).sum(dim=0)))
    return (importance + load) / 2


@dataclass
class TokenMoEOutput:
    """Scalars: the reconstruction loss, and the balance loss summed over MoE blocks."""

    reconstruction: Tensor
    balance: Tensor


class TokenMoE(nn.Module):
    """`mae` with token-routed experts in `blocks`."""

    def __init__(
        self,
        mae: MAE,
        blocks: Sequence[int],
        num_experts: int,
        gate_scale: str = "straight_through",
        gate_std: float = 0.02,
    ) -> None:
        """Turns `mae` into a mixture in place: pass a copy to keep the original."""
        super().__init__()
        self.mae = mae
        self.blocks = tuple(blocks)
        width = mae.encoder.embed_dim
        for layer in self.blocks:
            block: Any = mae.encoder.blocks[layer]
            block.mlp = TokenExpertFFN(block.mlp, width, num_experts, gate_scale, gate_std)

    @property
    def experts(self) -> list[TokenExpertFFN]:
        """The expert layers, one per MoE block."""
        return [cast(Any, self.mae.encoder.blocks[layer]).mlp for layer in self.blocks]

    def forward(
        self, images: Tensor, noise: Tensor, gate_noise: Tensor | None = None
    ) -> TokenMoEOutput:
        """images, noise: as in MAE; gate_noise: N(0, 1), [b, blocks, tokens seen, E] (None: drawn).

        In evaluation the balance loss is 0.
        """
        for index, layer in enumerate(self.experts):
            layer.noise = None if gate_noise is None else gate_noise[:, index].flatten(0, 1)
        output = self.mae(images, noise)
        balance = output.loss.new_zeros(())
        for layer in self.experts:
            if layer.balance is not None:
                balance = balance + layer.balance
            layer.balance = layer.noise = None  # no layer keeps a graph alive
        return TokenMoEOutput(output.loss, balance)


def copy_experts(source: VisionTransformer, target: VisionTransformer) -> VisionTransformer:
    """`target` with room for the token-routed experts of `source`, if it has any."""
    for old, new in zip(cast(Any, source.blocks), cast(Any, target.blocks), strict=True):
        if isinstance(old.mlp, TokenExpertFFN):
            new.mlp = copy.deepcopy(old.mlp)
    return target
