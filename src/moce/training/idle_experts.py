"""How a module and its optimizer are held: whole in every process, or a share in each (FSDP).

The loop trains `model` by `optimizer`. What it reads, saves and loads is the stage's own module and a
plain optimizer for it, which `gather` and `scatter` keep in step with the shares.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moce.models.experts import ExpertLayer
from moce.models.token_moe import TokenExpertFFN
from moce.runtime.distributed import all_reduce, world_size

if TYPE_CHECKING:
    pass


class IdleExperts:
    """Experts without an image in any process: the optimizer is to leave them where they are.

    With several processes every expert computes in each of them, if need be on no image, so that
    all gradients are there to be averaged. Those of idle experts are zero, not missing; with them
    weight decay and momentum would move the expert.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, ExpertLayer | TokenExpertFFN)]
        self._experts = [expert for layer in layers for expert in layer.experts]
        self._images = torch.zeros(len(self._experts), dtype=torch.int64)
        if world_size() > 1:
            for number, expert in enumerate(self._experts):
                expert.register_forward_pre_hook(partial(self._note, number))

    def _note(self, number: int, expert: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._images[number] += inputs[0].shape[0]

    def drop_gradients(self) -> None:
        """After the backward passes of a step: no gradient where there was no image."""
        if world_size() == 1 or not self._experts:
            return
        for expert, images in zip(self._experts, all_reduce(self._images).tolist(), strict=True):
            if images == 0:
                for parameter in expert.parameters():
                    parameter.grad = None
        self._images.zero_()
