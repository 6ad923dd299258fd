"""Idle experts: no optimizer update for experts that got no image in any process."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from moce.models.experts import ExpertLayer
from moce.models.token_moe import TokenExpertFFN
from moce.runtime.distributed import all_reduce, world_size


class IdleExperts:
    """Drops the gradients of idle experts, so that the optimizer skips them.

    With several processes every expert computes in each process, if need be on no image, so that
    all gradients exist to be averaged. Those of idle experts are then zero instead of None, and
    weight decay and momentum would move the expert. With one process there is nothing to do.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, ExpertLayer | TokenExpertFFN)]
        self._experts = [expert for layer in layers for expert in layer.experts]
        self._images = torch.zeros(len(self._experts), dtype=torch.int64)
        if world_size() > 1:
            for number, expert in enumerate(self._experts):
                expert.register_forward_pre_hook(partial(self._count, number))

    def _count(self, number: int, expert: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._images[number] += inputs[0].shape[0]

    def drop_gradients(self) -> None:
        """Set the gradients of idle experts to None; call after the backward passes of a step."""
        if world_size() == 1 or not self._experts:
            return
        for expert, images in zip(self._experts, all_reduce(self._images).tolist(), strict=True):
            if images == 0:
                for parameter in expert.parameters():
                    parameter.grad = None
        self._images.zero_()
