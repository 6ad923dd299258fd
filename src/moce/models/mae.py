"""The masked autoencoder (He et al., arXiv 2111.06377): mask, encode what is left, predict the rest."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from moce.errors import MoceError
from moce.models.encoder import (
    EncoderSpec,
    encode_tokens,
    initialise_from_scratch,
    initialise_linear,
    patchify,
    positions_of,
    sincos_positions,
    take,
)
from moce.models.recompute import recomputed, run_blocks


@dataclass(frozen=True)
class MAESpec:
    """All that is needed to build a masked autoencoder again."""

    encoder: EncoderSpec
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    mask_ratio: float = 0.75
    norm_pix: bool = True

    def build(self, *, pretrained: bool = False) -> MAE:
        """A masked autoencoder with fresh weights, or with timm's own weights in the encoder."""
        encoder = self.encoder.build(pretrained=pretrained)
        if not pretrained:
            initialise_from_scratch(encoder)
        decoder = Decoder(encoder, self.decoder_dim, self.decoder_depth, self.decoder_heads)
        return MAE(encoder, decoder, self.mask_ratio, self.norm_pix)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MAESpec:
        return cls(**{**values, "encoder": EncoderSpec.from_dict(values["encoder"])})


@dataclass
class Reconstruction:
    """loss: scalar; prediction: [b, n, p*p*c]; mask: [b, n], 1 where a patch was removed."""

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class Decoder(nn.Module):
    """A light ViT that sees the encoded patches and mask tokens, and predicts every patch's pixels."""

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
            *[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, height * width * encoder.in_chans)
        self.apply(initialise_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """tokens: [b, prefix + kept, width]; restore: [b, n] int64. Returns [b, n, p*p*c]."""
        tokens = self.embed(tokens)
        prefix, visible = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        missing = restore.shape[1] - visible.shape[1]
        masked = self.mask_token.to(visible.dtype).expand(visible.shape[0], missing, -1)
        patches = torch.cat([visible, masked], dim=1)
        tokens = torch.cat([prefix, take(patches, restore)], dim=1) + self.pos_embed
        tokens = run_blocks(self.blocks, tokens, self.grad_checkpointing)
        return self.head(self.norm(tokens))[:, self.num_prefix :]


class MAE(nn.Module):
    """Encoder (a timm ViT) and decoder; `forward` gives the reconstruction loss of a batch."""

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Decoder,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        positions_of(encoder).requires_grad_(False)  # sine-cosine, or as a loaded encoder has them
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.encoder.patch_embed.patch_size

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """images: [b, c, h, w], normalised; noise: [b, n] uniform, the smallest are kept."""
        keep, mask, restore = random_mask(noise, self.mask_ratio)
        # Not on GPUs, as long as nobody has measured what it costs there.
        with recomputed() if images.device.type == "cpu" else nullcontext():
            prediction = self.decoder(encode_tokens(self.encoder, images, keep), restore)
        target = patch_target(patchify(images.float(), self.patch_size), self.norm_pix)
        return Reconstruction(masked_mse(prediction.float(), target, mask), prediction, mask)


def num_kept(patches: int, ratio: float) -> int:
    """How many of an image's patches the encoder sees when the share `ratio` is hidden."""
    return max(1, int(patches * (1 - ratio)))


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the share `ratio` of the patches: those with the largest noise (MAE, section 3).

    noise: [b, n]. Returns keep [b, int(n * (1 - ratio))] (indices of visible patches), mask
    [b, n] (1 = removed) and restore [b, n] (where each patch stands in [visible, masked]).
    """
    num_keep = num_kept(noise.shape[1], ratio)
    shuffle = noise.argsort(dim=1, stable=True)
    restore = shuffle.argsort(dim=1)
    return shuffle[:, :num_keep], (restore >= num_keep).float(), restore


def unpatchify(patches: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for images of `size` (h, w)."""
    batch, rows, columns = patches.shape[0], size[0] // patch[0], size[1] // patch[1]
    split = patches.reshape(batch, rows, columns, patch[0], patch[1], -1)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, *size)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, with 1e-6 under the root) of every patch, [b, n, 1]."""
    mean = patches.mean(dim=-1, keepdim=True)
    # As patches.var, which takes up to 40 times as long on a CPU.
    squares = (patches - mean).square().sum(dim=-1, keepdim=True)
    return mean, (squares / (patches.shape[-1] - 1) + 1e-6).sqrt()


def patch_target(patches: Tensor, norm_pix: bool) -> Tensor:
    """What the decoder is to predict: pixels, or pixels normalised by their patch's statistics."""
    if not norm_pix:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error per patch, averaged over the removed patches. Scalar."""
    error = (prediction - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()
