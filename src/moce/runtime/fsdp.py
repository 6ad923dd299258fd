"""A module of which each process holds a share (FSDP2), and the whole one it came from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moce.runtime.distributed import is_rank0

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the parameters of a module over all processes, in place; blocks are gathered one by one."""
    from torch.distributed.fsdp import fully_shard

    processes = mesh["data_parallel"]
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    for part in (*reversed(blocks), module):  # experts that are blocks before what they are in
        fully_shard(part, mesh=processes)
    return module


def copy_to_shard(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, dict[Tensor, str]]:
    """A copy of a module, and the name of every parameter of the optimizer."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    of_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(module), {parameter: names[parameter] for parameter in of_optimizer}


def whole(value: Any) -> Any:
    """A tensor of which each process has a share, put together in all, on the CPU; others as they are."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def share_of(value: Tensor, like: Any) -> Tensor:
    """This process's share of a tensor that every process has, spread as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    # Such as a count of steps, which fused AdamW has on the device (others would have it on the CPU).
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value.to(like.device, copy=True)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def scatter_module(module: nn.Module, sharded: nn.Module) -> None:
    """The values of the whole module into the shares."""
    values = module.state_dict()
    for name, own in sharded.state_dict().items():
        own.copy_(share_of(values[name], own))


@torch.no_grad()
def gather_module(sharded: nn.Module, module: nn.Module) -> None:
    """The values of the shares into the whole module, in every process."""
    values = module.state_dict()
    for name, own in sharded.state_dict().items():
        values[name].copy_(whole(own))


def scatter_state(
    optimizer: torch.optim.Optimizer, sharded: torch.optim.Optimizer, replica: dict[Tensor, Tensor]
) -> None:
    """What an optimizer of whole parameters remembers into that of their shares."""
    for parameter, values in optimizer.state.items():
        own = replica[parameter]
        sharded.state[own] = {name: share_of(value, own) for name, value in values.items()}


def gather_state(
    sharded: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, replica: dict[Tensor, Tensor]
) -> None:
    """What an optimizer of shares remembers into that of the whole parameters, in the main process."""
    for parameter, own in replica.items():
        values = {name: whole(value) for name, value in sharded.state.get(own, {}).items()}
        if values and is_rank0():
            optimizer.state[parameter] = values


class Replicated:
    """Whole in every process; gradients are averaged (DDP), or there is one process."""

    def __init__(self, fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model: Any
        self.optimizer: Any
        self.model, self.optimizer = fabric.setup(module, optimizer)

    def scatter(self) -> None:
        """Begin with what the stage's module and its optimizer hold, or have loaded."""

    def gather_module(self) -> None:
        """Bring the stage's module up to date."""

    def gather(self) -> None:
        """Bring the stage's module and its optimizer up to date."""


class Sharded(Replicated):
    """A share in each process. The stage's module stays whole, on the CPU."""

    def __init__(self, fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module, self._whole = module, optimizer
        self._sharded, names = copy_to_shard(module, optimizer)
        self.model = fabric.setup_module(self._sharded)
        own = dict(self._sharded.named_parameters())
        self._shard_of: dict[Tensor, Tensor] = {p: own[name] for p, name in names.items()}
        groups = [
            {**group, "params": [self._shard_of[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        self._optimizer = torch.optim.AdamW(groups)  # fused, for the groups say so
        self.optimizer = fabric.setup_optimizers(self._optimizer)

    def scatter(self) -> None:
        scatter_module(self._module, self._sharded)
        scatter_state(self._whole, self._optimizer, self._shard_of)

    def gather_module(self) -> None:
        gather_module(self._sharded, self._module)

    def gather(self) -> None:
        self.gather_module()
        gather_state(self._optimizer, self._whole, self._shard_of)
