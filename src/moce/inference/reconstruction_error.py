"""Validation loss: the reconstruction error of whole images under fixed masks."""

from __future__ import annotations

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
    """Mean reconstruction loss over images, comparable between models and training steps.

    Every image is cropped to the middle and has one mask of its own, the same in every call.

    Args:
        clusters: [n] int64, by which a MoCE routes the images; None for an MAE.
        precision: float32 or bf16.
    """
    device = device or torch.device("cpu")
    model = model.to(device).eval()
    choose_attention(model, device, precision)
    mae = model.mae if isinstance(model, MoCE) else model
    total = 0.0
    for start in range(0, len(images), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(images)), device=device)
        stored = images.take(slice(start, start + batch_size)).to(device)
        pixels = normalize(fitted(stored, mae.encoder.patch_embed.img_size), spec.mean, spec.std)
        patches = mae.encoder.patch_embed.num_patches
        noise = keyed_uniform(0, Stream.MASK, torch.zeros_like(rows), rows, patches)
        own = None if clusters is None else clusters[rows.to(clusters.device)].to(device)
        with autocast(device, precision):
            routings = model.route(own) if isinstance(model, MoCE) and own is not None else None
            total += mae(pixels, noise, routings).loss.item() * len(rows)
    return total / len(images)
