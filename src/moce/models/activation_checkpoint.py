"""Less memory for a training step: what is within a block is made again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHECKPOINTING = "grad_checkpointing"  # what timm's networks call it, and ours


def set_checkpointing(module: nn.Module, enable: bool) -> None:
    """Whether networks in `module` keep only what goes into each block for the backward pass."""
    for part in module.modules():
        if hasattr(part, CHECKPOINTING):
            setattr(part, CHECKPOINTING, enable)


def run_blocks(blocks: nn.Sequential, tokens: Tensor, checkpointing: bool) -> Tensor:
    """Tokens [b, n, d] through all blocks.

    checkpointing: what is within a block is made again in the backward pass, the same numbers:
    one more forward pass, and the memory of one block where there was that of all.
    """
    for block in blocks:
        tokens = run_block(block, tokens, checkpointing=checkpointing)
    return tokens


def run_block(block: nn.Module, *inputs: Any, checkpointing: bool) -> Tensor:
    """What a block makes of its inputs; checkpointing as in `run_blocks`."""
    if not checkpointing or not torch.is_grad_enabled():
        return block(*inputs)
    contexts = partial(_contexts, block)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """Those of a block's forward pass and of its repetition.

    Layers that are told of a pass what is not in their input (`OF_A_PASS` names the attributes) are
    told the same again, and are left as they were.
    """
    layers = [layer for layer in block.modules() if hasattr(layer, "OF_A_PASS")]
    told = [_told(layer) for layer in layers]

    @contextmanager
    def again() -> Iterator[None]:
        before = [_told(layer) for layer in layers]
        _tell(layers, told)
        try:
            yield
        finally:
            _tell(layers, before)

    return nullcontext(), again()


def _told(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in layer.OF_A_PASS}


def _tell(layers: list[nn.Module], values: list[dict[str, Any]]) -> None:
    for layer, own in zip(layers, values, strict=True):
        for name, value in own.items():
            setattr(layer, name, value)
