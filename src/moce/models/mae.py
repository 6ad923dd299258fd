"""The masked autoencoder (He et al., arXiv 2111.06377): mask, encode what is left, predict the rest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from moce.errors import MoceError
from moce.models.decoder import Decoder
from moce.models.encoder import (
    EncoderSpec,
    encode_tokens,
    initialize_from_scratch,
    patchify,
    positions_of,
    take,
)


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
            initialize_from_scratch(encoder)
        decoder = Decoder(encoder, self.decoder_dim, self.decoder_depth, self.decoder_heads)
        return MAE(encoder, decoder, self.mask_ratio, self.norm_pix)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MAESpec:
        return cls(**{**values, "encoder": EncoderSpec.from_dict(values["encoder"])})


@dataclass
class Reconstruction:
    """loss: scalar; prediction: [b, m, p*p*c] of the removed patches, removed: [b, m], their places."""

    loss: Tensor
    prediction: Tensor
    removed: Tensor


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
        patches = encoder.patch_embed.num_patches
        if num_kept(patches, mask_ratio) == patches:
            raise MoceError(
                f"of {patches} patches none can be hidden; give larger images (--img-size)"
            )
        self.encoder = encoder
        positions_of(encoder).requires_grad_(False)  # sine-cosine, or as a loaded encoder has them
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.encoder.patch_embed.patch_size

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """images: [b, c, h, w], normalized; noise: [b, n] uniform, the smallest are kept."""
        keep, removed = random_mask(noise, self.mask_ratio)
        prediction = self.decoder(encode_tokens(self.encoder, images, keep), keep, removed)
        patches = take(patchify(images.float(), self.patch_size), removed)
        loss = mse_loss(prediction.float(), patch_target(patches, self.norm_pix))
        return Reconstruction(loss, prediction, removed)


def num_kept(patches: int, ratio: float) -> int:
    """How many of an image's patches the encoder sees when the share `ratio` is hidden."""
    return max(1, int(patches * (1 - ratio)))


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Remove the share `ratio` of the patches: those with the largest noise (MAE, section 3).

    noise: [b, n]. Returns the places of those that are kept, [b, int(n * (1 - ratio))], and of those
    that are removed, [b, m], int64 and in the order of their noise.
    """
    order = noise.argsort(dim=1, stable=True)
    kept = num_kept(noise.shape[1], ratio)
    return order[:, :kept], order[:, kept:]


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
    """What the decoder is to predict: pixels, or pixels normalized by their patch's statistics."""
    if not norm_pix:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation
