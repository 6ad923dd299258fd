"""One feature per image by any encoder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import in_order, to_cpu
from moce.models.encoder import (
    EncoderSpec,
    choose_attention,
    encode_tokens,
    fit_of,
    input_channels,
    pool_tokens,
)
from moce.runtime.device import autocast
from moce.runtime.progress import meter

PIXELS, GRID = "pixels", 16


def feature_width(vit: VisionTransformer, pooling: str) -> int:
    """The width of a feature."""
    return input_channels(vit) * GRID**2 if pooling == PIXELS else vit.embed_dim


def extract_features(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageDataset,
    *,
    device: torch.device,
    precision: str = "float32",
    pooling: str = "mean",
    batch_size: int = 256,
) -> Tensor:
    """One feature per image, [n, width] float32 on the CPU: without a mask, after the final norm.

    pooling: mean or cls tokens, or pixels: no encoder, the mean colors of a grid.
    """
    batches = feature_batches(
        vit,
        spec,
        images,
        device=device,
        precision=precision,
        pooling=pooling,
        batch_size=batch_size,
    )
    return torch.cat(list(batches))


@torch.inference_mode()
def feature_batches(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageDataset,
    *,
    device: torch.device,
    precision: str = "float32",
    pooling: str = "mean",
    batch_size: int = 256,
    rows: slice | None = None,
    quiet: bool = False,
) -> Generator[Tensor]:
    """`extract_features` batch by batch, [b, width], of all images or a slice of them.

    quiet: without a progress bar, for a caller that shows progress itself.
    """
    vit = vit.to(device).eval()
    choose_attention(vit, device, precision)
    count = rows.stop - rows.start if rows else len(images)

    def features(pixels: Tensor) -> Tensor:
        inputs = normalize(pixels, spec.mean, spec.std)
        with autocast(device, precision):  # left again before the caller uses the features
            return _features(vit, inputs, pooling)

    with (
        nullcontext() if quiet else meter("features", -(-count // batch_size)) as progress,
        closing(in_order(images, batch_size, device, fit_of(vit), rows)) as batches,
    ):
        for batch in to_cpu(map(features, batches)):
            yield batch
            if progress is not None:
                progress.advance()


def _features(vit: VisionTransformer, inputs: Tensor, pooling: str) -> Tensor:
    """[b, width] float32 of normalized images [b, c, h, w]."""
    if pooling == PIXELS:
        return adaptive_avg_pool2d(inputs, GRID).flatten(1).float()
    return pool_tokens(vit, encode_tokens(vit, inputs).float(), pooling)
