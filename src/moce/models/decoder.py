"""The decoder of the masked autoencoder: a light ViT that predicts the removed patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moce.errors import MoceError
from moce.models.activation_checkpoint import run_block
from moce.models.encoder import initialize_linear, sincos_positions


class Decoder(nn.Module):
    """A light ViT over the encoded patches and mask tokens; predicts pixels for the mask tokens.

    Every token carries its position, so tokens stay in the order of the mask, the removed patches
    last; attention does not depend on the order.
    """

    def __init__(self, encoder: VisionTransformer, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise MoceError(
                f"decoder width {dim} is no multiple of its {heads} attention heads; "
                "set decoder_heads to what it has"
            )
        grid, num_prefix = encoder.patch_embed.grid_size, encoder.num_prefix_tokens
        height, width = encoder.patch_embed.patch_size
        self.num_prefix = num_prefix
        self.grad_checkpointing = False
        self.pos_embed: Tensor
        self.embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(grid, dim, num_prefix))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth - 1)],
            LastBlock(dim, heads, qkv_bias=True, norm_layer=norm),
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, height * width * encoder.in_chans)
        self.apply(initialize_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor, removed: Tensor) -> Tensor:
        """Pixels of the removed patches, [b, m, p*p*c].

        tokens: [b, prefix + k, width], from the encoder; keep: [b, k] int64, the indices of their
        patches in the image; removed: [b, m] int64, those of the other patches.
        """
        positions = self.pos_embed[0]
        prefix, grid = positions[: self.num_prefix], positions[self.num_prefix :]
        tokens = self.embed(tokens)
        batch = tokens.shape[0]
        seen = tokens + torch.cat([prefix.expand(batch, -1, -1), grid[keep]], dim=1)
        masked = self.mask_token.to(tokens.dtype) + grid[removed]
        tokens = torch.cat([seen, masked], dim=1)
        for block in self.blocks[:-1]:
            tokens = run_block(block, tokens, checkpointing=self.grad_checkpointing)
        count = removed.shape[1]
        tokens = run_block(self.blocks[-1], tokens, count, checkpointing=self.grad_checkpointing)
        return self.head(self.norm(tokens))


class LastBlock(Block):
    """A block that computes its last tokens only, as no later block needs the others.

    For these tokens it equals the plain block; the others serve as keys and values.
    """

    def forward(self, tokens: Tensor, count: int) -> Tensor:  # type: ignore[override]
        """The last `count` of tokens [b, n, d]: [b, count, d]."""
        mixed = tokens[:, -count:] + self._attend(self.norm1(tokens), count)
        return mixed + self.mlp(self.norm2(mixed))

    def _attend(self, tokens: Tensor, count: int) -> Tensor:
        attn: Any = self.attn
        batch, length, _ = tokens.shape
        projected = attn.qkv(tokens).view(batch, length, 3, attn.num_heads, attn.head_dim)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        query = query[:, :, -count:]
        if attn.fused_attn:
            mixed = scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query * attn.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return attn.proj(mixed.transpose(1, 2).flatten(2))
