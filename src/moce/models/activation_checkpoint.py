"""Activation checkpointing: recompute the activations of a block in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FLAG = "grad_checkpointing"  # the attribute of timm's networks and of `Decoder`


def set_checkpointing(module: nn.Module, enable: bool) -> None:
    """Turn activation checkpointing on or off for all networks in `module` that support it."""
    for child in module.modules():
        if hasattr(child, FLAG):
            setattr(child, FLAG, enable)


def run_block(block: nn.Module, *inputs: Any, checkpointing: bool) -> Any:
    """`block(*inputs)`, with or without activation checkpointing.

    With it, the backward pass computes the block again, with the same random numbers: one more
    forward pass, and the memory of one block's activations instead of all blocks'.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)
