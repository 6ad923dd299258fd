"""MAE's linear probe: a linear layer on a frozen encoder, trained by LARS on augmented images.

The recipe is He et al.'s (arXiv 2111.06377, appendix A.1): a batch norm without weights before the
layer, LARS without weight decay, a cosine with warm-up, random resized crops and flips only.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn

from moce.config import ProbeSettings
from moce.data.dataset import ImageDataset
from moce.data.loader import Batch, BatchOrder, Loading, view_batches
from moce.data.rng import Stream, keyed_generator
from moce.errors import MoceError
from moce.inference.features import extract_features
from moce.models.encoder import encode_tokens, pool_tokens
from moce.runtime.device import autocast, to_device
from moce.runtime.progress import meter
from moce.training.objectives import augmented, views_of
from moce.training.optimizer import learning_rate, set_learning_rate
from moce.weights.from_runs import Backbone


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that is not trained. pooling: mean of patch tokens, or cls."""

    backbone: Backbone
    settings: ProbeSettings
    pooling: str
    device: torch.device
    precision: str

    def features(self, images: ImageDataset) -> Tensor:
        """One feature per image without augmentation, [n, width] float32 on the CPU."""
        return extract_features(
            self.backbone.vit,
            self.backbone.spec,
            images,
            device=self.device,
            precision=self.precision,
            pooling=self.pooling,
            batch_size=self.settings.micro_batch_size,
            shared=True,
        )

    def batches(self, images: ImageDataset, order: BatchOrder, total: int) -> Generator[Batch]:
        """Prefetched micro-batches of the steps 0 .. total - 1."""
        size = self.settings.micro_batch_size
        steps = (order(number) for number in range(total))
        chunks = (
            chunk
            for rows, epochs in steps
            for chunk in zip(rows.split(size), epochs.split(size), strict=True)
        )
        views = views_of(self.settings, self.backbone.vit.patch_embed.img_size)
        return view_batches(
            images, chunks, self.device, views, Loading(workers=self.settings.workers)
        )

    @torch.no_grad()  # not inference_mode: the head's backward pass needs the features
    def augmented_features(self, batches: Iterator[Batch], count: int) -> tuple[Tensor, Tensor]:
        """Features [count, width] float32 of the next micro-batches, and their rows on the CPU."""
        vit, spec, settings = self.backbone.vit, self.backbone.spec, self.settings
        size = tuple(vit.patch_embed.img_size)
        features, rows = [], []
        with autocast(self.device, self.precision):
            for batch in islice(batches, math.ceil(count / settings.micro_batch_size)):
                tokens = encode_tokens(vit, augmented(batch, settings, spec, size))
                features.append(pool_tokens(vit, tokens.float(), self.pooling))
                rows.append(batch.rows.cpu())
        return torch.cat(features), torch.cat(rows)


def sgd_scores(
    encoder: FrozenEncoder,
    images: ImageDataset,
    labels: np.ndarray,
    test: Tensor,
    num_classes: int,
) -> np.ndarray:
    """Scores (logits) [m, C] float32 of test images by a probe trained on `images`.

    labels: [n] int64 class numbers, or [n, C] float32 of 0 and 1; test: `encoder.features` of the test
    images, [m, width]. Raises MoceError if the loss is not finite.
    """
    head = build_head(test.shape[1], num_classes, encoder.settings.seed).to(encoder.device)
    train_head(head, encoder, images, labels)
    with torch.inference_mode():
        return head.eval()(test.to(encoder.device)).cpu().numpy()


def steps_of(settings: ProbeSettings, count: int) -> tuple[int, int]:
    """Steps, and images in each, of a probe on `count` images."""
    size = min(settings.batch_size, count)
    return math.ceil(settings.epochs * count / size), size


def build_head(width: int, num_classes: int, seed: int) -> nn.Sequential:
    """Batch norm without affine weights, then a linear layer initialized from the seed."""
    layer = nn.Linear(width, num_classes)
    generator = keyed_generator(seed, Stream.STEP, 0)
    nn.init.trunc_normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), layer)


def build_optimizer(head: nn.Module) -> Lars:
    """LARS; the rate of biases is not adapted."""
    matrices = [p for p in head.parameters() if p.ndim > 1]
    vectors = [p for p in head.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors}]
    return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0)


def train_head(
    head: nn.Module, encoder: FrozenEncoder, images: ImageDataset, labels: np.ndarray
) -> None:
    """Train the head in place. Raises MoceError if the loss is not finite."""
    settings = encoder.settings
    total, size = steps_of(settings, len(images))
    order = BatchOrder(len(images), size, settings.seed, images.far_files)
    targets = torch.from_numpy(labels)
    error = nn.BCEWithLogitsLoss() if labels.ndim == 2 else nn.CrossEntropyLoss()
    optimizer, peak = build_optimizer(head), settings.base_lr * size / 256
    head.train()
    with (
        meter("linear probe", total) as progress,
        closing(encoder.batches(images, order, total)) as batches,
    ):
        for number in range(total):
            set_learning_rate(
                optimizer, learning_rate(number, total, peak, settings.warmup, final=0.0)
            )
            rows, _ = order(number)
            features, rows = encoder.augmented_features(batches, len(rows))
            loss = error(head(features), to_device(targets[rows], features.device))
            if not loss.isfinite():
                raise MoceError("the probe's loss is not finite; try a lower --base-lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(f"loss {loss.item():.4f}")
