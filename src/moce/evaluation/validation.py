"""Validation while fine-tuning: a score on held-out images, the best weights, early stopping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce.config import FinetuneSettings
from moce.data.dataset import ImageDataset
from moce.evaluation.finetune import FinetuneObjective, local_scores
from moce.evaluation.metrics import score
from moce.models.encoder import EncoderSpec
from moce.runtime.distributed import broadcast
from moce.runtime.launch import is_rank0

BEST = "best."


@dataclass
class Validation:
    """Diagnostics of a fine-tuning, on the first process: the metric on held-out images, 0..1.

    labels: [n] class numbers or [n, C]. state: the best score, the rows since it, and its weights;
    checkpoints keep them.
    """

    objective: FinetuneObjective
    spec: EncoderSpec
    images: ImageDataset
    labels: np.ndarray
    metric: str
    settings: FinetuneSettings
    device: torch.device
    state: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self) -> dict[str, Any]:
        """Score the weights as they are, or their average; remember them if they are the best."""
        vit = cast(VisionTransformer, self.objective.evaluated)
        scores = local_scores(
            vit,
            self.spec,
            self.images,
            self.device,
            self.settings.precision,
            slice(0, len(self.images)),
        )
        vit.train()
        value = score(self.metric, scores.numpy(), self.labels)
        if value > self.best:
            weights = {BEST + k: v.detach().cpu().clone() for k, v in vit.state_dict().items()}
            self.state |= {"score": torch.tensor(value, dtype=torch.float64), **weights}
            self.state["since"] = torch.tensor(0)
        else:
            self.state["since"] += 1
        return {"val": value}

    @property
    def best(self) -> float:
        """The best score so far; -1 before the first."""
        return float(self.state.get("score", -1.0))

    def exhausted(self) -> bool:
        """Whether the last `patience` scores have brought nothing better."""
        patience = self.settings.patience
        return patience is not None and int(self.state.get("since", 0)) >= patience

    def restore_best(self, vit: nn.Module) -> float:
        """Load the best weights into the network, on all processes. Returns their score."""
        best = {k.removeprefix(BEST): v for k, v in self.state.items() if k.startswith(BEST)}
        if is_rank0():
            vit.load_state_dict(best)
        value = torch.tensor(self.best, dtype=torch.float64)
        for tensor in (*vit.state_dict().values(), value):
            broadcast(tensor)
        return float(value)
