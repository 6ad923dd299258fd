"""Fine-tuning as MAE does it: mean-pooled patch tokens, a new norm and head, layer-wise decay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms import v2

from moce.config import FinetuneSettings
from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import Batch, in_order
from moce.data.rng import Stream, keyed_generator
from moce.data.views import Views
from moce.evaluation.rand_augment import RandAugment, erase, image_keys, read_policy
from moce.models.encoder import EncoderSpec, fit_of
from moce.runtime.device import autocast
from moce.runtime.distributed import all_reduce, shard_range
from moce.training.freeze import freeze_first
from moce.training.objectives import views_of
from moce.training.thread_parallel import Losses, images_per_chunk
from moce.training.trainer import Objective, Step
from moce.weights.from_runs import Backbone

# Published settings for encoders of at least this depth and width, largest first: ViT-H and ViT-L
# (MAE, appendix A.1, and its authors' code). The defaults of FinetuneSettings are those of ViT-B.
_LARGE: dict[str, Any] = {"epochs": 50, "base_lr": 1e-3, "warmup": 0.1, "layer_decay": 0.75}
LARGER_SIZES: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (32, 1280, {**_LARGE, "drop_path": 0.3}),
    (24, 1024, {**_LARGE, "drop_path": 0.2}),
)
# Adapters start from nothing and are few: they take ten times the rate, the same in every block.
LORA: dict[str, Any] = {"base_lr": 5e-3, "layer_decay": 1.0}


def by_size(settings: FinetuneSettings, vit: VisionTransformer) -> FinetuneSettings:
    """Replace defaults by the published values for the encoder's size, and by those for LoRA."""
    fitting = (
        published
        for depth, width, published in LARGER_SIZES
        if len(vit.blocks) >= depth and vit.embed_dim >= width
    )
    values = next(fitting, {}) | (LORA if settings.lora else {})
    given = settings.model_fields_set
    return settings.model_copy(update={k: v for k, v in values.items() if k not in given})


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, at least one each, [n - m] and [m] int64.

    labels: [n] class numbers, split by class as far as possible, or [n, C] for several per image,
    split at random.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:
        order = order[np.argsort(labels[order], kind="stable")]
    count = min(max(1, round(share * len(labels))), len(labels) - 1)
    # Evenly spaced in the order of classes, so every class gives its share.
    held = ((np.arange(count) + 0.5) * len(labels) / count).astype(np.int64)
    return np.sort(np.delete(order, held)), np.sort(order[held])


def build_classifier(backbone: Backbone, num_classes: int, drop_path: float) -> VisionTransformer:
    """A timm ViT with the backbone's weights and a new norm, after pooling, in place of the final one."""
    vit = backbone.build(
        num_classes=num_classes, global_pool="avg", fc_norm=True, drop_path_rate=drop_path
    )
    weights = {k: v for k, v in backbone.vit.state_dict().items() if not k.startswith("norm.")}
    missing, unexpected = vit.load_state_dict(weights, strict=False)
    missing = [k for k in missing if not k.startswith(("head.", "fc_norm."))]
    assert not missing and not unexpected, (missing, unexpected)  # the architectures are the same
    assert isinstance(vit.head, nn.Linear)
    nn.init.trunc_normal_(vit.head.weight, std=2e-5)
    nn.init.zeros_(vit.head.bias)
    return vit


class FinetuneObjective(Objective):
    """Augmented and mixed images, cross-entropy, layer-wise decayed learning rates.

    labels: [n] int64 class numbers, or [n, C] float32 of 0 and 1 for several per image, with a binary
    cross-entropy per class. Raises MoceError if timm cannot read the RandAugment policy.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        spec: EncoderSpec,
        images: ImageDataset,
        labels: np.ndarray,
        settings: FinetuneSettings,
    ) -> None:
        freeze_first(vit, settings.freeze)
        groups = param_groups_layer_decay(
            vit,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            no_weight_decay_list=vit.no_weight_decay(),
        )
        views = tuning_views(settings, spec, vit.patch_embed.img_size)
        tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
        size = images_per_chunk(tokens, vit.embed_dim)
        super().__init__("finetune", vit, images, groups, size, views=views, ema=settings.ema)
        self._seed, self._targets = settings.seed, torch.from_numpy(labels)
        self.classes = self._targets if settings.sampling == "balanced" else None
        self._inputs = Inputs(settings, spec, views)
        self._mix = _mixer(settings, vit.num_classes)
        self._criterion = _criterion(labels, vit.num_classes, settings)

    @property
    def uses_mixup(self) -> bool:
        return self._mix is not None

    def converged(self) -> bool:
        return getattr(self.diagnostics, "exhausted", lambda: False)()

    def prepared(self, batch: Batch, step: Step) -> Mixed:
        """Views, mixed by one draw for the whole micro-batch."""
        pixels = self._inputs(batch)
        if self._targets.device != batch.rows.device:
            self._targets = self._targets.to(batch.rows.device)
        targets = self._targets[batch.rows]
        if self._mix:
            with _seeded(self._seed, step):
                pixels, targets = self._mix(pixels, targets)
        self._criterion.to(pixels.device)
        own = slice(step.num_leading, None)
        weights = self._weights_of(targets[own])
        return Mixed(batch.rows[own], batch.epochs[own], pixels[own], targets[own], weights)

    def loss(self, model: nn.Module, batch: Mixed, step: Step) -> Losses:
        value = self._criterion(model(batch.pixels).float(), batch.targets)
        return {"loss": value if batch.weights is None else value * batch.weights.mean()}

    def _weights_of(self, targets: Tensor) -> Tensor | None:
        """Each image's share of the weights that the cross-entropy of class numbers divides by."""
        weight = getattr(self._criterion, "weight", None)
        if weight is None or targets.ndim == 2:
            return None
        return weight[targets] / weight[targets].mean()


@dataclass
class Mixed:
    """Images to learn from. rows, epochs: [b]; pixels: the network's input, [b, c, h, w].

    targets: [b] or [b, C]; weights: [b], with mean 1, of a loss that is a weighted mean.
    """

    rows: Tensor
    epochs: Tensor
    pixels: Tensor
    targets: Tensor
    weights: Tensor | None

    def take(self, places: slice | Tensor) -> Mixed:
        weights = None if self.weights is None else self.weights[places]
        first = (self.rows[places], self.epochs[places], self.pixels[places])
        return Mixed(*first, self.targets[places], weights)


def _criterion(labels: np.ndarray, num_classes: int, settings: FinetuneSettings) -> nn.Module:
    """Cross-entropy, or binary cross-entropies for [n, C] labels."""
    if labels.ndim == 2:
        return nn.BCEWithLogitsLoss()
    weight = None
    if settings.class_weights == "balanced":
        images = np.bincount(labels, minlength=num_classes).clip(min=1)
        weight = torch.from_numpy(len(labels) / (num_classes * images)).float()
    return nn.CrossEntropyLoss(weight, label_smoothing=settings.smoothing)


def tuning_views(settings: FinetuneSettings, spec: EncoderSpec, size: tuple[int, int]) -> Views:
    """Crop, flip, and RandAugment if it is on. Raises MoceError if timm cannot read its policy."""
    policy = read_policy(settings.rand_augment, spec, size)
    augment = None if policy is None else RandAugment(settings.seed, policy)
    return replace(views_of(settings, size), policy=augment)


@dataclass(frozen=True)
class Inputs:
    """The network's input from a batch: views, normalization, erasing."""

    settings: FinetuneSettings
    spec: EncoderSpec
    views: Views

    def __call__(self, batch: Batch) -> Tensor:
        """Float32 [b, 3, h, w], normalized."""
        images = normalize(batch.views(self.views), self.spec.mean, self.spec.std)
        _, to_erase = image_keys(self.settings.seed, batch.rows, batch.epochs)
        return erase(images, to_erase, self.settings.random_erasing)


@contextmanager
def _seeded(seed: int, step: Step) -> Iterator[None]:
    """Seed torch by step and chunk, so that all processes mix a chunk of the batch alike."""
    with torch.random.fork_rng(devices=[]):
        generator = keyed_generator(seed, Stream.MIX, step.number << 20 | step.micro_batch)
        torch.default_generator.manual_seed(generator.initial_seed())
        yield


def _mixer(settings: FinetuneSettings, num_classes: int) -> v2.Transform | None:
    """Mixup or cutmix, chosen at random per batch, or the one that is switched on.

    Every image is mixed with its predecessor in the batch, the first with the last.
    """
    kinds: list[v2.Transform] = []
    if settings.mixup > 0:
        kinds.append(v2.MixUp(alpha=settings.mixup, num_classes=num_classes))
    if settings.cutmix > 0:
        kinds.append(v2.CutMix(alpha=settings.cutmix, num_classes=num_classes))
    return v2.RandomChoice(kinds) if kinds else None


def predict_scores(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageDataset,
    device: torch.device,
    precision: str,
    batch_size: int = 256,
) -> np.ndarray:
    """Logits of every image, [n, C] float32; the processes share the work."""
    own = shard_range(len(images))
    scores = torch.zeros(len(images), vit.num_classes)
    scores[own] = local_scores(vit, spec, images, device, precision, own, batch_size)
    return all_reduce(scores).numpy()


@torch.inference_mode()
def local_scores(
    vit: VisionTransformer,
    spec: EncoderSpec,
    images: ImageDataset,
    device: torch.device,
    precision: str,
    own: slice,
    batch_size: int = 256,
) -> Tensor:
    """Logits of a slice of the images, [m, C] float32, by this process alone."""
    vit = vit.to(device).eval()
    with autocast(device, precision):
        scores = [
            vit(normalize(pixels, spec.mean, spec.std)).float().cpu()
            for pixels in in_order(images, batch_size, device, fit_of(vit), own)
        ]
    return torch.cat(scores) if scores else torch.zeros(0, vit.num_classes)
