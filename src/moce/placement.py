"""Tensors on their way to an accelerator, without waiting for it, if it has room, and back for a file."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a GPU's free memory, up to which data are kept there. Little, for it is looked at before there
# are gradients, AdamW's averages and, the most, what a forward pass keeps for the backward pass.
RESIDENT_SHARE = 0.25


def fits_on(device: torch.device, num_bytes: int) -> bool:
    """Whether so much data may stay on a device: on a CUDA device with room to spare."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= RESIDENT_SHARE * free


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. What is computed on a CUDA device meanwhile is not waited for."""
    if device.type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def tally(numbers: Tensor, count: int) -> Tensor:
    """How often 0 .. count - 1 are among `numbers` [m] int64: [count] int64.

    As `bincount`, which on a CUDA device would wait for it, to look for the largest.
    """
    if numbers.device.type == "cpu":
        return numbers.bincount(minlength=count)
    return (numbers[:, None] == torch.arange(count, device=numbers.device)).sum(dim=0)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, copied only where two share their memory: safetensors takes no such."""
    ready: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        ready[name] = value.clone() if memory in known else value
        known.add(memory)
    return ready
