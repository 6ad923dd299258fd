"""One feature per image by any encoder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Any

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
from moce.runtime.distributed import all_gather_rows, rank, world_size
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
    shared: bool = False,
) -> Tensor:
    """One feature per image, [n, width] float32 on the CPU: without a mask, after the final norm.

    pooling: mean or cls tokens, or pixels: no encoder, the mean colors of a grid. shared: all processes
    call this with the same images, and share the work.
    """
    make = shared_feature_batches if shared else feature_batches
    batches = make(
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
    share: slice = slice(None),
    quiet: bool = False,
) -> Generator[Tensor]:
    """`extract_features` batch by batch, [b, width], of all images or a slice of them.

    share: which of the batches. quiet: without a bar, for a caller that shows progress itself.
    """
    vit = vit.to(device).eval()
    choose_attention(vit, device, precision)
    count = rows.stop - rows.start if rows else len(images)
    batches_of_all = range(-(-count // batch_size))

    def features(pixels: Tensor) -> Tensor:
        inputs = normalize(pixels, spec.mean, spec.std)
        with autocast(device, precision):  # left again before the caller uses the features
            return _features(vit, inputs, pooling)

    with (
        nullcontext() if quiet else meter("features", len(batches_of_all[share])) as progress,
        closing(in_order(images, batch_size, device, fit_of(vit), rows, share)) as batches,
    ):
        for batch in to_cpu(map(features, batches)):
            yield batch
            if progress is not None:
                progress.advance()


def shared_feature_batches(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageDataset,
    *,
    batch_size: int = 256,
    **options: Any,
) -> Generator[Tensor]:
    """`feature_batches` of all images in every process, each of which makes its share of them.

    Process r makes batches r, r + world_size(), ...: the batches of one process, so that features are
    the same to the bit. All processes have to take all batches. options: of `feature_batches`.
    """
    starts, processes = range(0, len(images), batch_size), world_size()
    sizes = [min(batch_size, len(images) - start) for start in starts]
    share = slice(rank(), None, processes)
    width = feature_width(vit, options.get("pooling", "mean"))
    own = feature_batches(vit, spec, images, batch_size=batch_size, share=share, **options)
    with closing(own):
        for turn in range(0, len(sizes), processes):
            counts = sizes[turn : turn + processes]
            counts += [0] * (processes - len(counts))
            yield from all_gather_rows(next(own, torch.empty(0, width)), counts)[
                : len(sizes) - turn
            ]


def _features(vit: VisionTransformer, inputs: Tensor, pooling: str) -> Tensor:
    """[b, width] float32 of normalized images [b, c, h, w]."""
    if pooling == PIXELS:
        return adaptive_avg_pool2d(inputs, GRID).flatten(1).float()
    return pool_tokens(vit, encode_tokens(vit, inputs).float(), pooling)
