"""The masked autoencoder (He et al., arXiv 2111.06377): mask patches, encode the rest, predict them."""

from __future__ import annotations

from collections.abc import Mapping
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
    """How to build a masked autoencoder; stored in every run.

    mask_ratio: share of the patches that are removed; norm_pix: predict pixels normalized per patch.
    """

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
    """Output of `MAE`.

    loss: scalar; prediction: [b, m, p*p*c], of the removed patches; removed: [b, m] int64, their
    indices in the image.
    """

    loss: Tensor
    prediction: Tensor
    removed: Tensor


class MAE(nn.Module):
    """A timm ViT as the encoder, and a light decoder. Raises MoceError if no patch can be masked."""

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

    def forward(
        self, images: Tensor, noise: Tensor, routings: Mapping[int, Any] | None = None
    ) -> Reconstruction:
        """Mask, encode and reconstruct a batch.

        Args:
            images: [b, c, h, w], normalized.
            noise: [b, n] uniform; the patches with the smallest noise are kept.
            routings: as in `encode_tokens`, for a mixture.
        """
        keep, removed = random_mask(noise, self.mask_ratio)
        return self.reconstruct(
            encode_tokens(self.encoder, images, keep, routings), images, keep, removed
        )

    def reconstruct(
        self, tokens: Tensor, images: Tensor, keep: Tensor, removed: Tensor
    ) -> Reconstruction:
        """Predict the removed patches from encoded tokens [b, prefix + k, width].

        images: [b, c, h, w], normalized; keep: [b, k] and removed: [b, m], from `random_mask`.
        """
        prediction = self.decoder(tokens, keep, removed)
        patches = take(patchify(images.float(), self.patch_size), removed)
        loss = mse_loss(prediction.float(), patch_target(patches, self.norm_pix))
        return Reconstruction(loss, prediction, removed)


def num_kept(patches: int, ratio: float) -> int:
    """Number of an image's patches that the encoder sees when the share `ratio` is removed."""
    return max(1, int(patches * (1 - ratio)))


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Remove the share `ratio` of the patches: those with the largest noise (MAE, section 3).

    noise: [b, n]. Returns the indices of the kept patches, [b, num_kept(n, ratio)], and of the
    removed ones, [b, m], int64, in ascending order of the noise.
    """
    order = noise.argsort(dim=1, stable=True)
    kept = num_kept(noise.shape[1], ratio)
    return order[:, :kept], order[:, kept:]


def unpatchify(patches: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify` for images of `size` (h, w): [b, n, p*p*c] to [b, c, h, w]."""
    batch, rows, columns = patches.shape[0], size[0] // patch[0], size[1] // patch[1]
    split = patches.reshape(batch, rows, columns, patch[0], patch[1], -1)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, *size)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, with 1e-6 under the root) of every patch, [b, n, 1]."""
    mean = patches.mean(dim=-1, keepdim=True)
    # Equals patches.var, which is up to 40 times slower on a CPU.
    squares = (patches - mean).square().sum(dim=-1, keepdim=True)
    return mean, (squares / (patches.shape[-1] - 1) + 1e-6).sqrt()


def patch_target(patches: Tensor, norm_pix: bool) -> Tensor:
    """The decoder's target: pixels [b, n, p*p*c], with `norm_pix` normalized per patch."""
    if not norm_pix:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation
