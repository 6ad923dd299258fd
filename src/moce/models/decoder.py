"""The decoder of the masked autoencoder: a light ViT that predicts the removed patches, and only those."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moce.errors import MoceError
from moce.models.activation_checkpoint import run_block, run_blocks
from moce.models.encoder import initialize_linear, sincos_positions


class Decoder(nn.Module):
    """A light ViT that sees the encoded patches and mask tokens, and predicts the pixels behind the latter.

    Attention does not mind the order of its tokens, each of which carries its position: they stay in
    that of the mask, the removed ones last, and need not be put back in that of the image.
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

        tokens: [b, prefix + k, width], encoded; keep [b, k] and removed [b, m]: int64, the places in
        the image of the patches in `tokens` and of the others.
        """
        positions = self.pos_embed[0]
        prefix, grid = positions[: self.num_prefix], positions[self.num_prefix :]
        tokens = self.embed(tokens)
        batch = tokens.shape[0]
        seen = tokens + torch.cat([prefix.expand(batch, -1, -1), grid[keep]], dim=1)
        masked = self.mask_token.to(tokens.dtype) + grid[removed]
        again = self.grad_checkpointing
        tokens = run_blocks(self.blocks[:-1], torch.cat([seen, masked], dim=1), again)
        tokens = run_block(self.blocks[-1], tokens, removed.shape[1], checkpointing=again)
        return self.head(self.norm(tokens))


class LastBlock(Block):
    """A block that works on its last tokens only, for no block after it would see the others.

    What it returns for them is what the whole block does; the others are keys and values.
    """

    def forward(self, tokens: Tensor, wanted: int) -> Tensor:  # type: ignore[override]
        """The last `wanted` of tokens [b, n, d]: [b, wanted, d]."""
        mixed = tokens[:, -wanted:] + self._attend(self.norm1(tokens), wanted)
        return mixed + self.mlp(self.norm2(mixed))

    def _attend(self, tokens: Tensor, wanted: int) -> Tensor:
        attn: Any = self.attn
        batch, count, _ = tokens.shape
        parts = attn.qkv(tokens).view(batch, count, 3, attn.num_heads, attn.head_dim)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        query = query[:, :, -wanted:]
        if attn.fused_attn:
            mixed = scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query * attn.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return attn.proj(mixed.transpose(1, 2).flatten(2))
