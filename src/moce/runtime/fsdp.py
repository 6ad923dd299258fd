"""FSDP2: shard a module over processes; full state dicts for checkpoints, sharded or not."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from moce.runtime.distributed import world_size

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.device_mesh import DeviceMesh

OptimizerState = dict[int, dict[str, Tensor]]


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the parameters of a module over all processes, in place, one group per ViT block."""
    from torch.distributed.fsdp import fully_shard

    processes = mesh["data_parallel"]
    blocks = [child for child in module.modules() if isinstance(child, Block)]
    for child in (*reversed(blocks), module):  # inner blocks (experts) before outer ones
        fully_shard(child, mesh=processes)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been applied to the module."""
    if world_size() == 1:  # FSDP takes a while to import
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module. Sharded: on the CPU of rank 0, empty elsewhere; call on all ranks."""
    if not is_sharded(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    weights: Any = get_model_state_dict(module, options=_options(cpu_offload=True))
    return weights


def full_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """State by number of the parameter, as in `optimizer.state_dict()`; sharded: as `full_state`.

    A parameter that never had a gradient (an idle expert's) has no state.
    """
    if not is_sharded(module):
        return optimizer.state_dict()["state"]
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    found: Any = get_optimizer_state_dict(module, optimizer, options=_options(cpu_offload=True))
    if not found:
        return {}
    names = chain.from_iterable(group["params"] for group in found["param_groups"])
    state = found["state"]
    return {number: state[name] for number, name in enumerate(names) if name in state}


def load_full_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    state: OptimizerState,
) -> None:
    """Load what `full_state` and `full_optimizer_state` return; every rank passes all of it.

    Raises RuntimeError if the weights do not fit the module.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not is_sharded(module):
        module.load_state_dict(weights)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    set_model_state_dict(module, dict(weights), options=_options())
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = list(chain.from_iterable(g["params"] for g in optimizer.param_groups))
    groups = [{**g, "params": [names[parameters[n]] for n in g["params"]]} for g in groups]
    named: Any = {names[parameters[number]]: values for number, values in state.items()}
    full = {"state": named, "param_groups": groups}
    set_optimizer_state_dict(module, optimizer, full, options=_options(strict=False))
    # torch creates a state for every parameter; those without one must start at their first step.
    for number, parameter in enumerate(parameters):
        if number not in state:
            optimizer.state.pop(parameter, None)


def _options(**flags: Any) -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, **flags)
