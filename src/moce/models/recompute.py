"""Less memory for a training step: outputs are made again in the backward pass.

Those of cheap layers (`recomputed`), or all that is within a block (`run_blocks`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

CHEAP = (nn.GELU, nn.LayerNorm)
CHECKPOINTING = "grad_checkpointing"  # what timm's networks call it, and ours
Again = Callable[[], Tensor]


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
    if not checkpointing or not torch.is_grad_enabled():
        return blocks(tokens)
    for block in blocks:
        contexts = partial(_contexts, block)
        tokens = checkpoint(block, tokens, use_reentrant=False, context_fn=contexts)
    return tokens


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


@contextmanager
def recomputed() -> Iterator[None]:
    """Within the context the outputs of GELUs and layer norms are not kept for the backward pass.

    The linear layer after each of them needs its output for the gradient of its weights. Instead
    the layer's input is kept, which is kept anyway, and the output is made again from it: the same
    numbers, for a few per cent of time and about a third of the activations' memory.
    """
    known: dict[int, tuple[Tensor, Again]] = {}  # by address, as long as the output is alive

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, CHEAP) and output.requires_grad:
            address, layer, given = output.data_ptr(), module, inputs[0].detach()
            known[address] = output.detach(), lambda: layer.forward(given)
            weakref.finalize(output, known.pop, address, None)

    handle = register_module_forward_hook(remember)
    try:
        with saved_tensors_hooks(lambda tensor: _pack(tensor, known), _unpack):
            yield
    finally:
        handle.remove()


def _pack(tensor: Tensor, known: dict[int, tuple[Tensor, Again]]) -> Any:
    output, again = known.get(tensor.data_ptr(), (None, None))
    if output is None or again is None or not _same(tensor, output):
        return tensor
    return tensor.shape, again


def _same(tensor: Tensor, output: Tensor) -> bool:
    """Whether a tensor holds all of `output`, in its order: a view, not a part or a copy."""
    return (
        tensor.numel() == output.numel()
        and tensor.dtype == output.dtype
        and tensor.is_contiguous()
        and output.is_contiguous()
    )


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    shape, again = packed
    with torch.no_grad():
        return again().view(shape)
