"""A student of distillation: any timm model, with linear maps to its teacher's features."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec, encode_tokens, pool_tokens


class Student(nn.Module):
    """net: the model; the linear maps are only for training."""

    def __init__(self, net: nn.Module, teacher_width: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = net
        with torch.no_grad():
            pooled, grid = self.features(torch.zeros(1, *size))
        self.of_pooled = nn.Linear(pooled.shape[1], teacher_width)
        self.of_patches = nn.Linear(grid.shape[1], teacher_width)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled feature, [b, width], and the map of patches, [b, channels, rows, columns]."""
        net: Any = self.net
        if isinstance(net, VisionTransformer):
            tokens = encode_tokens(net, images)
            patches = tokens[:, net.num_prefix_tokens :].transpose(1, 2)
            grid = patches.unflatten(2, net.patch_embed.grid_size)
            return pool_tokens(net, tokens, "mean"), grid
        found = net.forward_features(images)
        return net.forward_head(found, pre_logits=True), as_map(net, found)

    def forward(self, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Predicted features of the teacher: [b, width], and [b, width, *grid] of its patches."""
        pooled, patches = self.features(images)
        if patches.shape[2:] != grid:
            patches = interpolate(patches, grid, mode="bilinear", align_corners=False)
        mapped = self.of_patches(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.of_pooled(pooled), mapped


def as_map(net: Any, features: Tensor) -> Tensor:
    """What `forward_features` of a timm model returns, as a map [b, channels, rows, columns].

    Raises MoceError for shapes that are no map of the image.
    """
    if features.ndim == 3:  # tokens
        patches = features[:, getattr(net, "num_prefix_tokens", 0) :].transpose(1, 2)
        grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
        if grid is not None and grid[0] * grid[1] == patches.shape[2]:
            return patches.unflatten(2, tuple(grid))
    elif features.ndim == 4 and features.shape[1] == net.num_features:
        return features
    elif features.ndim == 4 and features.shape[3] == net.num_features:
        return features.permute(0, 3, 1, 2)
    raise MoceError(
        f"{type(net).__name__} has features of shape {tuple(features.shape)}, which are no map of "
        "patches; choose another --model"
    )


def build_student(
    name: str, model_args: dict[str, Any], teacher: VisionTransformer, spec: EncoderSpec
) -> tuple[nn.Module, EncoderSpec]:
    """A fresh timm model for images as its teacher takes them, and how to build it.

    A plain ViT gets the teacher's sizes of image and patch unless they are given. Raises MoceError if
    timm cannot build it.
    """
    arguments = {**model_args, "in_chans": teacher.in_chans}
    if not timm.is_model(name):
        raise MoceError(f"timm has no model '{name}' (timm.list_models() lists all)")
    with torch.device("meta"):
        plain = isinstance(timm.create_model(name, num_classes=0), VisionTransformer)
    if plain:
        sizes = {name: getattr(teacher.patch_embed, name) for name in ("img_size", "patch_size")}
        arguments = {**{k: list(v) for k, v in sizes.items()}, **arguments}
        own = EncoderSpec(name, arguments, spec.mean, spec.std)
        return own.build(), own
    try:
        net = timm.create_model(name, num_classes=0, **arguments)
    except Exception as error:  # timm checks few arguments: anything may come back
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MoceError(f"timm cannot build {name} with {arguments}: {reason}") from None
    return net, EncoderSpec(name, arguments, spec.mean, spec.std)
