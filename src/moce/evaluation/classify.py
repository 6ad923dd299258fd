"""A fine-tuned classifier applied to images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit, softmax
from timm.models.vision_transformer import VisionTransformer

from moce.data.dataset import ImageDataset
from moce.errors import raise_if_corrupt
from moce.evaluation.finetune import predict_scores
from moce.models.encoder import EncoderSpec
from moce.runs.files import read_tensors
from moce.runs.model import INFO, WEIGHTS, read_info
from moce.weights.from_runs import load_weights


@dataclass
class Classifier:
    """A ViT with a head, how to feed it, and its classes. multi_label: an image may have several."""

    vit: VisionTransformer
    spec: EncoderSpec
    classes: list[str]
    multi_label: bool

    def probabilities(
        self, images: ImageDataset, device: torch.device, precision: str, batch_size: int
    ) -> np.ndarray:
        """[n, C] float32; rows sum to 1 unless an image may have several classes."""
        scores = predict_scores(self.vit, self.spec, images, device, precision, batch_size)
        return expit(scores) if self.multi_label else softmax(scores, axis=1)


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a `moce finetune` run. Raises MoceError if it is corrupt."""
    info = read_info(folder)
    with raise_if_corrupt(folder / INFO):
        spec, classes = EncoderSpec.from_dict(info["spec"]), [str(c) for c in info["classes"]]
        vit = spec.build(num_classes=len(classes), global_pool="avg", fc_norm=True)
        multi_label = bool(info.get("multi_label", "map11" in info["metrics"]))
    load_weights(vit, read_tensors(folder / WEIGHTS), folder)
    return Classifier(vit.eval(), spec, classes, multi_label)
