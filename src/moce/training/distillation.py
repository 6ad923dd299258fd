"""Distillation: a student learns to predict its teacher's features of unlabeled images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, layer_norm, mse_loss

from moce.config import DistillSettings
from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import Batch
from moce.models.encoder import encode_tokens, input_size, pool_tokens
from moce.models.student import Student
from moce.training.objectives import cropped, views_of
from moce.training.optimizer import parameter_groups
from moce.training.thread_parallel import Losses
from moce.training.trainer import Objective, Step
from moce.weights.from_runs import Backbone


class DistillObjective(Objective):
    """1 - cosine of the pooled features, and the mean squared error of normed patch features.

    size: (h, w) of the student's images. Teacher and student see the same crop, each in its size.
    """

    images: ImageDataset

    def __init__(
        self,
        student: Student,
        size: tuple[int, int],
        teacher: Backbone,
        images: ImageDataset,
        settings: DistillSettings,
        device: torch.device,
    ) -> None:
        groups = parameter_groups(student.parameters(), settings.weight_decay)
        views = views_of(settings, input_size(teacher.vit))
        super().__init__("distill", student, images, groups, views=views)
        self._size, self._spec, self._settings = size, teacher.spec, settings
        self._teacher = teacher.vit.to(device).eval().requires_grad_(False)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        crops = cropped(batch, self._settings, input_size(self._teacher))
        pooled, patches = self._targets(crops)
        if crops.shape[2:] != self._size:
            crops = interpolate(crops.float(), self._size, mode="bicubic", antialias=True)
            crops = crops.clamp(0, 255)
        images = normalize(crops, self._spec.mean, self._spec.std)
        own_pooled, own_patches = model(images, tuple(patches.shape[2:]))
        of_pooled = (1 - cosine_similarity(own_pooled.float(), pooled)).mean()
        of_patches = mse_loss(own_patches.float(), patches)
        loss = of_pooled + self._settings.patch_weight * of_patches
        return {"loss": loss, "pooled": of_pooled, "patches": of_patches}

    @torch.no_grad()
    def _targets(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's pooled features [b, width] and normed patches [b, width, rows, columns]."""
        vit = self._teacher
        images = normalize(crops, self._spec.mean, self._spec.std)
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=self._settings.precision == "bf16"
        ):
            tokens = encode_tokens(vit, images)
        tokens = tokens.float()
        patches = layer_norm(tokens[:, vit.num_prefix_tokens :], tokens.shape[2:])
        grid = patches.transpose(1, 2).unflatten(2, vit.patch_embed.grid_size)
        return pool_tokens(vit, tokens, "mean"), grid


def size_of(net: nn.Module, teacher: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a student's images: its own if it has a fixed one, else its teacher's."""
    embed = getattr(net, "patch_embed", None)
    fixed = getattr(embed, "img_size", None) if embed is not None else None
    return (fixed[0], fixed[1]) if fixed is not None else teacher
