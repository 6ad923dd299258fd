"""Settings of distill."""

from __future__ import annotations

from typing import Any

from moce.config.base import (
    BACKBONE,
    EXPORTED,
    IMAGES,
    Data,
    MonitoredSettings,
    NonNegative,
    Positive,
    Reference,
)
from moce.config.facts import setting


class DistillSettings(MonitoredSettings):
    """Train a small student to have the features of a backbone, on unlabeled images."""

    proofs = frozenset({"distillation.json"})
    files = EXPORTED

    backbone: Reference = setting(description=BACKBONE, input="weights")
    data: Data = setting(description=IMAGES, input="images")
    model: str = setting("vit_tiny_patch16_224", "student: any timm model")
    model_args: dict[str, Any] = setting(
        {},
        'timm model arguments, e.g. {"embed_dim": 128, "depth": 6}; a plain ViT takes img_size and '
        "patch_size from the backbone unless they are given",
    )
    patch_weight: NonNegative = setting(
        1.0, "weight of the patches' squared error beside the pooled features' 1 - cosine"
    )
    base_lr: Positive = setting(
        1e-3, "learning rate per 256 images; the rate is base_lr * batch_size / 256"
    )
