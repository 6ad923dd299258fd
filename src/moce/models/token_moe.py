"""TokenMoE, the baseline: the same experts in the same blocks, but the gate reads each token.

As V-MoE (arXiv 2106.05974) with k = 1: noise N(0, 1/E^2) on the logits in training, importance and
load losses at half the weight each, experts that start as copies. A token's gate sees colors and
edges, not the image's content, so such a model cannot be made dense for a task: it is evaluated
with all its experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from moce.models.activation_checkpoint import run_block
from moce.models.encoder import embed_images
from moce.models.experts import apply_experts, replace_ffn
from moce.models.gates import squared_cv
from moce.models.mae import MAE, MAESpec, random_mask
from moce.runtime.distributed import all_reduce_autograd


@dataclass(frozen=True)
class TokenMoESpec:
    """How to build a TokenMoE, whose weights are then loaded; stored in every run."""

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
        typed = {"mae": MAESpec.from_dict(values["mae"]), "blocks": tuple(values["blocks"])}
        return cls(**{**values, **typed})


class TokenExpertFFN(nn.Module):
    """Replaces a ViT block's FFN: every token goes to the expert that its own gate chooses."""

    def __init__(
        self, ffn: nn.Module, width: int, num_experts: int, gate_scale: str, gate_std: float = 0.02
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(num_experts))
        self.gate = nn.Parameter(torch.randn(num_experts, width) * gate_std)
        self.gate_scale = gate_scale

    def forward(self, tokens: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route and compute tokens [b, n, d].

        noise: N(0, 1), [b, n, E], for the gates in training (default: drawn here). Returns
        outputs [b, n, d] and the scalar balance loss, which is 0 in evaluation.
        """
        rows = tokens.flatten(0, 1)
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 logits flip choices
            clean = rows.float() @ self.gate.float().T
            noisy, balance = clean, clean.new_zeros(())
            if self.training:
                deviation = 1 / len(self.experts)
                drawn = torch.randn_like(clean) if noise is None else noise.reshape(clean.shape)
                noisy = clean + drawn * deviation
                balance = token_balance(clean, noisy, deviation)
            probability, expert = noisy.softmax(dim=1).max(dim=1)
        if self.gate_scale == "straight_through":
            probability = probability / probability.detach()
        mixed = apply_experts(self.experts, rows, expert)
        return (mixed * probability[:, None].to(mixed.dtype)).view_as(tokens), balance


class TokenMoEBlock(Block):
    """A timm block whose FFN is a `TokenExpertFFN`; built by `replace_ffn`."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, noise: Tensor | None = None, return_balance: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens: [b, n, d]; noise: as in `TokenExpertFFN`. Returns [b, n, d].

        return_balance: also return the balance loss. timm's own forward calls the block without it.
        """
        tokens = tokens + self.drop_path1(self.ls1(self.attn(self.norm1(tokens))))
        outputs, balance = self.mlp(self.norm2(tokens), noise)
        tokens = tokens + self.drop_path2(self.ls2(outputs))
        return (tokens, balance) if return_balance else tokens


def token_balance(clean: Tensor, noisy: Tensor, deviation: float) -> Tensor:
    """Mean of the importance and load losses of V-MoE (section A.2), a scalar.

    Importance: CV^2 of the summed probabilities. Load: CV^2 of the summed chances that an expert
    would be chosen if its noise were drawn again, a smooth count of its tokens. Both sums are over
    the tokens of all processes.

    Args:
        clean, noisy: logits [m, E] without and with noise.
        deviation: standard deviation of the noise.
    """
    importance = squared_cv(all_reduce_autograd(clean.softmax(dim=1).sum(dim=0)))
    needed = noisy.amax(dim=1, keepdim=True) - clean
    load = squared_cv(all_reduce_autograd(torch.special.ndtr(-needed / deviation).sum(dim=0)))
    return (importance + load) / 2


@dataclass
class TokenMoEOutput:
    """Output of `TokenMoE`: scalar losses; balance is summed over MoE blocks."""

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
        """Change `mae` into a mixture in place: pass a copy to keep the original.

        blocks: numbers of the encoder blocks that get experts; gate_std: standard deviation of the
        initial gate weights.
        """
        super().__init__()
        self.mae = mae
        self.blocks = tuple(blocks)
        width = mae.encoder.embed_dim
        for number in self.blocks:
            block: Any = mae.encoder.blocks[number]
            ffn = TokenExpertFFN(block.mlp, width, num_experts, gate_scale, gate_std)
            mae.encoder.blocks[number] = replace_ffn(block, ffn, TokenMoEBlock)

    @property
    def experts(self) -> list[TokenExpertFFN]:
        """The expert layers, one per MoE block."""
        return [cast(Any, self.mae.encoder.blocks[layer]).mlp for layer in self.blocks]

    def forward(
        self, images: Tensor, noise: Tensor, gate_noise: Tensor | None = None
    ) -> TokenMoEOutput:
        """Losses of a batch; in evaluation the balance loss is 0.

        images, noise: as in `MAE`; gate_noise: N(0, 1), [b, blocks, visible tokens, E] (default:
        drawn by every block).
        """
        vit = self.mae.encoder
        keep, removed = random_mask(noise, self.mae.mask_ratio)
        tokens = embed_images(vit, images, keep)
        balance = tokens.new_zeros((), dtype=torch.float32)
        # As `encode_tokens`, with blocks that return their balance loss, too.
        for number, block in enumerate(vit.blocks):
            if number not in self.blocks:
                tokens = run_block(block, tokens, checkpointing=vit.grad_checkpointing)
                continue
            drawn = None if gate_noise is None else gate_noise[:, self.blocks.index(number)]
            tokens, loss = run_block(
                block, tokens, drawn, True, checkpointing=vit.grad_checkpointing
            )
            balance = balance + loss
        output = self.mae.reconstruct(vit.norm(tokens), images, keep, removed)
        return TokenMoEOutput(output.loss, balance)


def copy_experts(source: VisionTransformer, target: VisionTransformer) -> VisionTransformer:
    """Give `target` copies of the token-routed experts of `source`, if it has any."""
    blocks: Any = target.blocks
    for number, block in enumerate(source.blocks):
        if isinstance(block, TokenMoEBlock):
            experts = copy.deepcopy(block.mlp)
            blocks[number] = replace_ffn(blocks[number], experts, TokenMoEBlock)
    return target
