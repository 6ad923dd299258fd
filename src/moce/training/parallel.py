"""How a module and its optimiser are held: whole in every process, or a share in each (FSDP).

The loop trains `model` by `optimiser`. What it reads, saves and loads is the stage's own module and a
plain optimiser for it, which `gather` and `scatter` keep in step with the shares.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moce.config import TrainingSettings
from moce.data.batches import own_parts
from moce.errors import MoceError
from moce.models.experts import ExpertLayer
from moce.models.token_moe import TokenExpertFFN
from moce.processes import all_sum, world
from moce.sharding import (
    copy_to_shard,
    gather_module,
    gather_state,
    scatter_module,
    scatter_state,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Held:
    """Whole in every process; gradients are averaged (DDP), or there is one process."""

    def __init__(self, fabric: Fabric, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.model: Any
        self.optimiser: Any
        self.model, self.optimiser = fabric.setup(module, optimiser)

    def scatter(self) -> None:
        """Begin with what the stage's module and its optimiser hold, or have loaded."""

    def gather_module(self) -> None:
        """Bring the stage's module up to date."""

    def gather(self) -> None:
        """Bring the stage's module and its optimiser up to date."""


class Shared(Held):
    """A share in each process. The stage's module stays whole, on the CPU."""

    def __init__(self, fabric: Fabric, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self._module, self._whole = module, optimiser
        self._sharded, names = copy_to_shard(module, optimiser)
        self.model = fabric.setup_module(self._sharded)
        own = dict(self._sharded.named_parameters())
        self._twin: dict[Tensor, Tensor] = {p: own[name] for p, name in names.items()}
        groups = [
            {**group, "params": [self._twin[p] for p in group["params"]]}
            for group in optimiser.param_groups
        ]
        self._optimiser = torch.optim.AdamW(groups)  # fused, for the groups say so
        self.optimiser = fabric.setup_optimizers(self._optimiser)

    def scatter(self) -> None:
        scatter_module(self._module, self._sharded)
        scatter_state(self._whole, self._optimiser, self._twin)

    def gather_module(self) -> None:
        gather_module(self._sharded, self._module)

    def gather(self) -> None:
        self.gather_module()
        gather_state(self._optimiser, self._whole, self._twin)


class IdleExperts:
    """Experts without an image in any process: the optimiser is to leave them where they are.

    With several processes every expert computes in each of them, if need be on no image, so that
    all gradients are there to be averaged. Those of idle experts are zero, not missing; with them
    weight decay and momentum would move the expert.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, ExpertLayer | TokenExpertFFN)]
        self._experts = [expert for layer in layers for expert in layer.experts]
        self._images = torch.zeros(len(self._experts), dtype=torch.int64)
        if world() > 1:
            for number, expert in enumerate(self._experts):
                expert.register_forward_pre_hook(partial(self._note, number))

    def _note(self, number: int, expert: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._images[number] += inputs[0].shape[0]

    def drop_gradients(self) -> None:
        """After the backward passes of a step: no gradient where there was no image."""
        if world() == 1 or not self._experts:
            return
        for expert, images in zip(self._experts, all_sum(self._images).tolist(), strict=True):
            if images == 0:
                for parameter in expert.parameters():
                    parameter.grad = None
        self._images.zero_()


def check_share(settings: TrainingSettings) -> None:
    """Raise MoceError if a process would have no image in some forward pass."""
    size, parts = settings.batch_size, own_parts(settings.batch_size, settings.micro_batch_size)
    shortest = torch.tensor([part.stop - part.start for part in parts]).amin()
    idle = int(all_sum((shortest == 0).long()))
    if idle:
        of = f", {settings.micro_batch_size} a pass" if settings.micro_batch_size else ""
        raise MoceError(
            f"a batch of {size} images{of} leaves some of {world()} processes without an image in a "
            "forward pass; start fewer processes, or give another batch_size or micro_batch_size"
        )


def check_agreed(done: int) -> None:
    """Raise MoceError if the processes have found different checkpoints to go on from."""
    total = int(all_sum(torch.tensor(done)))
    differ = int(all_sum(torch.tensor(int(total != done * world()))))
    if differ:
        raise MoceError(
            "the processes find different checkpoints; the output folder has to be on a disk that all "
            "nodes share"
        )
