"""AdamW with weight decay on matrices only; warm-up and cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

ParameterGroup = dict[str, Any]


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, lr_scale: float = 1.0
) -> list[ParameterGroup]:
    """AdamW groups: matrices with weight decay; biases, norms and other vectors without (as MAE).

    Frozen parameters are left out. lr_scale: factor of the learning rate.
    """
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """torch's AdamW as it is without torch.compile, for which each of these imports the compiler (2 s)."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def adamw(groups: list[ParameterGroup], beta2: float) -> AdamW:
    """Fused AdamW: with many experts a loop over the parameters takes several times as long."""
    return AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)


def learning_rate(step: int, total: int, peak: float, warmup: float, final: float) -> float:
    """Learning rate of step 0..total-1: linear warm-up, then a cosine from `peak` to `final`.

    warmup: share of the steps, 0..1.
    """
    rising = warmup * total
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, total - rising)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: the rate times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
