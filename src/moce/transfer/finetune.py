"""Fine-tuning as MAE does it: mean-pooled patch tokens, a new norm and head, layer-wise decay."""

from __future__ import annotations

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms import v2

from moce.config import FinetuneSettings
from moce.data.augment import normalise
from moce.data.batches import Batch, in_order
from moce.data.images import ImageSet
from moce.hardware import autocast
from moce.loading import Backbone
from moce.models.encoder import EncoderSpec
from moce.training.loop import Losses, Stage, Step
from moce.training.stages import augmented


def build_classifier(backbone: Backbone, num_classes: int, drop_path: float) -> VisionTransformer:
    """A timm ViT with the backbone's weights, its final norm replaced by a fresh one after pooling."""
    vit = backbone.spec.build(
        num_classes=num_classes, global_pool="avg", fc_norm=True, drop_path_rate=drop_path
    )
    weights = {k: v for k, v in backbone.vit.state_dict().items() if not k.startswith("norm.")}
    missing, surplus = vit.load_state_dict(weights, strict=False)
    unexpected = [k for k in missing if not k.startswith(("head.", "fc_norm."))] + list(surplus)
    assert not unexpected, unexpected  # the same spec built both
    assert isinstance(vit.head, nn.Linear)
    nn.init.trunc_normal_(vit.head.weight, std=2e-5)
    nn.init.zeros_(vit.head.bias)
    return vit


def finetune_stage(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageSet,
    labels: np.ndarray,
    settings: FinetuneSettings,
) -> Stage:
    """Cross-entropy with label smoothing, mixup or cutmix, layer-wise decayed learning rates."""
    size = vit.patch_embed.img_size
    targets = torch.from_numpy(labels)
    mix = _mixer(settings, vit.num_classes)

    def loss(model: nn.Module, batch: Batch, step: Step) -> Losses:
        pixels = augmented(batch, settings, spec, size)
        wanted: Tensor = targets.to(batch.rows.device)[batch.rows]
        pixels, wanted = mix(pixels, wanted) if mix else (pixels, wanted)
        logits = model(pixels).float()
        return {
            "loss": nn.functional.cross_entropy(logits, wanted, label_smoothing=settings.smoothing)
        }

    groups = param_groups_layer_decay(
        vit,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        no_weight_decay_list=vit.no_weight_decay(),
    )
    return Stage("finetune", vit, images, groups, loss)


def _mixer(settings: FinetuneSettings, num_classes: int) -> v2.Transform | None:
    """Mixup or cutmix, one of them per batch with equal chance, as far as they are switched on."""
    kinds: list[v2.Transform] = []
    if settings.mixup > 0:
        kinds.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
    if settings.cutmix > 0:
        kinds.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
    return v2.RandomChoice(kinds) if kinds else None


@torch.inference_mode()
def predict(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageSet,
    device: torch.device,
    precision: str,
    batch_size: int = 256,
) -> np.ndarray:
    """The predicted class number of every image, [n] int64."""
    vit = vit.to(device).eval()
    with autocast(device, precision):
        parts = [
            vit(normalise(pixels, spec.mean, spec.std)).argmax(dim=1).cpu()
            for pixels in in_order(images, batch_size, device)
        ]
    return torch.cat(parts).numpy()
