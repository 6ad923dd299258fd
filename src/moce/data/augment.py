"""Random resized crop, flip and normalization of whole batches, on the training device.

A resize is two small matrix products per image. The rows of each matrix are the weights of an
antialiased bicubic filter, so crops of different sizes need no loop. On CPUs the zeros in these
matrices cost too much for larger images, which are resized one by one.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from moce.data.decode import to_pixels
from moce.models.fit import Fit
from moce.runtime.device import to_device

TRIES = 10  # as in torchvision's RandomResizedCrop
NARROWEST, WIDEST = 3 / 4, 4 / 3  # ratios of a crop's width to its height
ONE_BY_ONE_FROM = 48 * 48  # pixels of an image, at which a loop beats products on CPUs


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 or float pixels 0..255 [b, c, h, w] to float32 of zero mean and unit deviation."""
    center, scale = (_per_channel(tuple(values), pixels.device) for values in (mean, std))
    # In place: three times as fast for a large batch on CPUs, where new memory costs more than the sums.
    new = not pixels.is_floating_point()  # may be changed: float() has copied it
    images = pixels.float().sub_(center) if new else pixels.float() - center
    return images.div_(scale)


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel, times 255, [1, c, 1, 1]; cached on the device."""
    with torch.inference_mode(False):  # the first caller may be in it, a later one may train
        return torch.tensor(values).reshape(1, -1, 1, 1).mul(255).to(device)


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalize`, as float32 clamped to 0..1."""
    shape = (1, -1, 1, 1)
    scale = torch.tensor(std, device=images.device).reshape(shape)
    return (images * scale + torch.tensor(mean, device=images.device).reshape(shape)).clamp(0, 1)


def random_crops(uniform: Tensor, size: tuple[int, int], smallest: float) -> Tensor:
    """Boxes (top, left, height, width), [b, 4] int64, as torchvision's RandomResizedCrop draws them.

    uniform: [b, 4 * TRIES] in [0, 1): of each try the area, the ratio, top and left. size: (h, w) of
    the images. smallest: least share of the area. Aspect ratios (width to height) lie between 3/4
    and 4/3; if no try fits, the box is the largest in the middle of the image with such a ratio.
    """
    height, width = size
    area, ratio, down, right = uniform.reshape(-1, TRIES, 4).unbind(dim=2)
    area = (smallest + (1 - smallest) * area) * height * width
    ratio = torch.exp(math.log(NARROWEST) + ratio * math.log(WIDEST / NARROWEST))
    crop_width = (area * ratio).sqrt().round().long()
    crop_height = (area / ratio).sqrt().round().long()
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    whole = ~fits.any(dim=1, keepdim=True)
    fallback = middle_box(size)
    crop_height = crop_height.gather(1, first).masked_fill(whole, fallback[2])
    crop_width = crop_width.gather(1, first).masked_fill(whole, fallback[3])
    top = (down.gather(1, first) * (height - crop_height + 1)).long()
    left = (right.gather(1, first) * (width - crop_width + 1)).long()
    top, left = top.masked_fill(whole, fallback[0]), left.masked_fill(whole, fallback[1])
    return torch.cat([top, left, crop_height, crop_width], dim=1)


def middle_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box (top, left, height, width) in the middle with a ratio of 3/4 to 4/3."""
    height, width = size
    box_height, box_width = height, width
    if width / height < NARROWEST:
        box_height = round(width / NARROWEST)
    elif width / height > WIDEST:
        box_width = round(height * WIDEST)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Antialiased bicubic weights, [b, target, source], that resize a section of a row to `target`.

    start, length: [b] int64, the section start .. start + length - 1 of `source` pixels. The filter
    is Pillow's and torchvision's (a = -0.5), cut off at the ends of the section.
    """
    start, scale = start.float()[:, None, None], length.float()[:, None, None] / target
    support = scale.clamp(min=1)
    output = torch.arange(target, device=start.device)[None, :, None]
    pixel = torch.arange(source, device=start.device)[None, None, :]
    distance = (pixel + 0.5 - start - (output + 0.5) * scale).abs() / support
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    inside = (pixel >= start) & (pixel < start + length.float()[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def resized_crop(pixels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop every image to its box and resize it to `size`; float32, clamped to 0..255, not rounded.

    pixels: [b, c, h, w]; boxes: [b, 4] int64 (top, left, height, width).
    """
    if pixels.device.type == "cpu" and pixels.shape[2] * pixels.shape[3] >= ONE_BY_ONE_FROM:
        return resized_one_by_one(pixels, boxes, size)
    return resized_by_products(pixels, boxes, size)


def resized_one_by_one(pixels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """`resized_crop` with a loop over the images."""
    images = torch.empty(*pixels.shape[:2], *size)
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = pixels[row, None, :, top : top + height, left : left + width].float()
        images[row] = interpolate(crop, size, mode="bicubic", antialias=True)[0]
    return images.clamp_(0, 255)


def resized_by_products(pixels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """`resized_crop` with two matrix products for the whole batch."""
    top, left, height, width = boxes.unbind(dim=1)
    rows = resize_weights(top, height, pixels.shape[2], size[0])
    columns = resize_weights(left, width, pixels.shape[3], size[1])
    batch, channels, _, source_width = pixels.shape
    # One product for all channels of an image: [b, h, source] @ [b, source, c * w].
    stacked = pixels.float().permute(0, 2, 1, 3).reshape(batch, -1, channels * source_width)
    stacked = (rows @ stacked).reshape(batch, size[0] * channels, source_width)
    images = (stacked @ columns.transpose(1, 2)).reshape(batch, size[0], channels, size[1])
    return images.permute(0, 2, 1, 3).clamp(0, 255)


def fitted(pixels: Tensor, fit: tuple[int, int] | Fit) -> Tensor:
    """Images that are kept at a size of their own made to fit an encoder, on their device; uint8.

    pixels: [b, c, h, w] uint8; returned unchanged if they have the size of `fit`.
    """
    fit = fit if isinstance(fit, Fit) else Fit(fit)
    height, width = pixels.shape[2:]
    size = fit.size
    if (height, width) == tuple(size):
        return pixels
    if fit.crop_mode != "center" or fit.interpolation != "bicubic":
        return _fitted_by_timm(pixels, fit)
    scale = min(height / size[0], width / size[1]) * fit.crop_pct
    box_height, box_width = round(size[0] * scale), round(size[1] * scale)
    box = [(height - box_height) // 2, (width - box_width) // 2, box_height, box_width]
    boxes = to_device(torch.tensor([box]), pixels.device).expand(len(pixels), -1)
    return resized_crop(pixels, boxes, size).round().to(torch.uint8)


def _fitted_by_timm(pixels: Tensor, fit: Fit) -> Tensor:
    """One by one, on the CPU."""
    images = (to_pixels(image.permute(1, 2, 0).numpy(), fit, len(image)) for image in pixels.cpu())
    return torch.from_numpy(np.stack(list(images))).to(pixels.device)


def augment(
    pixels: Tensor, uniform: Tensor, size: tuple[int, int], smallest_crop: float, hflip: bool
) -> Tensor:
    """Random resized crop and flip of a batch; float32 0..255, [b, c, *size].

    uniform: [b, 4 * TRIES + 1] in [0, 1), the only source of randomness.
    """
    boxes = random_crops(uniform[:, 1:], (pixels.shape[2], pixels.shape[3]), smallest_crop)
    images = resized_crop(pixels, boxes, size)
    if hflip:
        flipped = (uniform[:, 0] < 0.5)[:, None, None, None]
        images = torch.where(flipped, images.flip(3), images)
    return images
