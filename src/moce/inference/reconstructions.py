"""What a masked autoencoder fills in: images masked, and reconstructed from what is left of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moce.data.augment import denormalize, normalize
from moce.data.rng import Stream, keyed_uniform
from moce.models.encoder import EncoderSpec, patchify, put, take
from moce.models.mae import MAE, patch_statistics, unpatchify
from moce.models.moce import MoCE

GRAY = 0.82  # of a removed patch, 0..1


@dataclass
class Reconstructed:
    """masked: images whose removed patches are gray; filled: with the prediction pasted in.

    Both [b, c, h, w] uint8. error: mean loss of the removed patches.
    """

    masked: Tensor
    filled: Tensor
    error: float


@torch.no_grad()
def reconstruct(
    model: MAE | MoCE, spec: EncoderSpec, pixels: Tensor, clusters: Tensor | None = None
) -> Reconstructed:
    """Mask images and fill them in, on the device of `pixels`, [b, c, h, w] uint8 of the model's size.

    clusters: [b] int64, by which a MoCE routes the images. Image i has the i-th mask, the same in
    every call and for every model with as many patches.
    """
    mae = model.mae if isinstance(model, MoCE) else model
    images = normalize(pixels, spec.mean, spec.std)
    noise = fixed_noise(torch.arange(len(pixels), device=pixels.device), mae)
    routings = model.route(clusters) if isinstance(model, MoCE) and clusters is not None else None
    output = mae(images, noise, routings)
    painted = paste(output.prediction, output.removed, images, mae.patch_size, mae.norm_pix)
    masked = hide(pixels.float() / 255, output.removed, mae.patch_size)
    filled = _to_bytes(denormalize(painted, spec.mean, spec.std))
    return Reconstructed(masked, filled, output.loss.item())


def fixed_noise(rows: Tensor, mae: MAE) -> Tensor:
    """Uniform noise [b, patches] that masks image i, of rows [b] int64, alike in every call."""
    patches = mae.encoder.patch_embed.num_patches
    return keyed_uniform(0, Stream.MASK, torch.zeros_like(rows), rows, patches)


def paste(
    prediction: Tensor, removed: Tensor, images: Tensor, patch: tuple[int, int], norm_pix: bool
) -> Tensor:
    """Images with their removed patches replaced by the prediction, [b, c, h, w].

    prediction: [b, m, p*p*c]; removed: [b, m], their places; images: [b, c, h, w], normalized.
    With norm_pix the prediction is scaled back by the true patch's mean and deviation.
    """
    patches = patchify(images, patch)
    if norm_pix:
        mean, deviation = patch_statistics(take(patches, removed))
        prediction = prediction * deviation + mean
    pasted = put(patches, removed, prediction.float())
    return unpatchify(pasted, patch, (images.shape[2], images.shape[3]))


def hide(images: Tensor, removed: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images 0..1 [b, c, h, w] with removed patches gray, as uint8."""
    patches = patchify(images, patch)
    gray = torch.full_like(take(patches, removed), GRAY)
    hidden = put(patches, removed, gray)
    return _to_bytes(unpatchify(hidden, patch, (images.shape[2], images.shape[3])))


def as_rgb(pixels: Tensor) -> Tensor:
    """Images [n, c, h, w] to look at, [n, 3, h, w]: the first three channels, or the first one in gray."""
    return pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
