"""Features of whole image sets by any timm ViT: what clustering, selection and probes all read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import brought_back, in_order
from moce.models.encoder import (
    EncoderSpec,
    choose_attention,
    encode_tokens,
    input_channels,
    input_size,
    pool_tokens,
)
from moce.runtime.device import autocast
from moce.runtime.progress import meter

PIXELS, GRID = "pixels", 16


def feature_width(vit: VisionTransformer, pooling: str) -> int:
    """How many numbers make up the feature of an image."""
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
    """One feature per image, [n, width] float32 on the CPU: no mask, after the final norm.

    pooling: mean, cls, or pixels: no network at all, but the mean colors of a grid.
    """
    parts = feature_batches(
        vit,
        spec,
        images,
        device=device,
        precision=precision,
        pooling=pooling,
        batch_size=batch_size,
    )
    return torch.cat(list(parts))


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
    part: slice | None = None,
) -> Iterator[Tensor]:
    """What `extract_features` gives, batch by batch, [b, width]; of a part of the images, or all."""
    vit = vit.to(device).eval()
    choose_attention(vit, device, precision)
    count = part.stop - part.start if part else len(images)

    def computed(pixels: Tensor) -> Tensor:
        inputs = normalize(pixels, spec.mean, spec.std)
        with autocast(device, precision):  # not while the caller uses the feature
            return _feature(vit, inputs, pooling)

    with (
        meter("features", -(-count // batch_size)) as progress,
        closing(in_order(images, batch_size, device, input_size(vit), part)) as batches,
    ):
        for feature in brought_back(map(computed, batches)):
            yield feature
            progress.advance()


def _feature(vit: VisionTransformer, inputs: Tensor, pooling: str) -> Tensor:
    """[b, width] float32 of normalized images [b, c, h, w]."""
    if pooling == PIXELS:
        return adaptive_avg_pool2d(inputs, GRID).flatten(1).float()
    return pool_tokens(vit, encode_tokens(vit, inputs).float(), pooling)
