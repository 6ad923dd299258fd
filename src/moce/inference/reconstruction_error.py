"""The reconstruction error of whole images under fixed masks: comparable between models and steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moce.data.augment import fitted, normalize
from moce.data.dataset import ImageDataset
from moce.data.rng import Stream, keyed_uniform
from moce.models.encoder import EncoderSpec, choose_attention
from moce.models.mae import MAE
from moce.models.moce import MoCE
from moce.runtime.device import autocast


@torch.inference_mode()
def reconstruction_error(
    model: MAE | MoCE,
    spec: EncoderSpec,
    images: ImageDataset,
    *,
    clusters: Tensor | None = None,
    device: torch.device | None = None,
    precision: str = "float32",
    batch_size: int = 256,
) -> float:
    """Mean loss over the images, in the middle crop of the model's shape, each with one mask of its own.

    clusters: [n] int64, by which a mixture routes the images (None for an MAE).
    """
    device = device or torch.device("cpu")
    model = model.to(device).eval()
    choose_attention(model, device, precision)
    mae = model.mae if isinstance(model, MoCE) else model
    total = 0.0
    for start in range(0, len(images), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(images)))
        stored = images.take(slice(start, start + batch_size)).to(device)
        pixels = normalize(fitted(stored, mae.encoder.patch_embed.img_size), spec.mean, spec.std)
        on_device = rows.to(device)
        patches = mae.encoder.patch_embed.num_patches
        noise = keyed_uniform(0, Stream.MASK, torch.zeros_like(on_device), on_device, patches)
        with autocast(device, precision), _routed(model, clusters, rows):
            total += mae(pixels, noise).loss.item() * len(rows)
    return total / len(images)


def _routed(
    model: MAE | MoCE, clusters: Tensor | None, rows: Tensor
) -> AbstractContextManager[None]:
    if isinstance(model, MoCE) and clusters is not None:
        return model.routed(clusters[rows].to(model.clusters.device))
    return nullcontext()
