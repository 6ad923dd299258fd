"""Validation loss: the reconstruction error of whole images under fixed masks."""

from __future__ import annotations

import torch
from torch import Tensor

from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import in_order
from moce.inference.reconstructions import fixed_noise
from moce.models.encoder import EncoderSpec, choose_attention, fit_of
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
    start = 0
    for fitting in in_order(images, batch_size, device, fit_of(mae.encoder)):
        rows = torch.arange(start, start + len(fitting), device=device)
        start += len(fitting)
        pixels = normalize(fitting, spec.mean, spec.std)
        noise = fixed_noise(rows, mae)
        own = None if clusters is None else clusters[rows.to(clusters.device)].to(device)
        with autocast(device, precision):
            routings = model.route(own) if isinstance(model, MoCE) and own is not None else None
            total += mae(pixels, noise, routings).loss.item() * len(rows)
    return total / len(images)
