"""AdamW with weight decay on matrices only, and warm-up followed by a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ParameterGroup = dict[str, Any]


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, lr_scale: float = 1.0
) -> list[ParameterGroup]:
    """Two groups: matrices, with decay; biases, norms and other vectors, without (as MAE)."""
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[ParameterGroup], beta2: float) -> torch.optim.AdamW:
    """Fused AdamW: with many experts the plain loop over parameters costs several times as much."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)


def learning_rate(step: int, total: int, peak: float, warmup: float, final: float) -> float:
    """Rate of step 0..total-1: linear over the share `warmup` of the steps, then a cosine to `final`."""
    rising = warmup * total
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, total - rising)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share (`lr_scale`) of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
