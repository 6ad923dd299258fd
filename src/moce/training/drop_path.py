"""Drop path whose random numbers are those of each image, so that chunks and processes draw alike."""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers import DropPath
from torch import Tensor, nn

from moce.data.loader import Batch
from moce.data.rng import Stream, keyed_uniform
from moce.models.experts import ExpertLayer


class KeyedDropPath(DropPath):
    """timm's stochastic depth, by given numbers; without them it draws its own.

    numbers: [b] in [0, 1), for the images of the next passes, forward and recomputed.
    """

    numbers: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, ...]; those of dropped images become 0."""
        if self.numbers is None or not self.training:
            return super().forward(tokens)
        kept = (self.numbers >= self.drop_prob).to(tokens.dtype)
        if self.scale_by_keep:
            kept = kept / (1 - self.drop_prob)
        return tokens * kept.view(-1, *[1] * (tokens.ndim - 1))


def use_keyed_drop_path(module: nn.Module) -> None:
    """Replace timm's drop path in place, but not within experts, which see part of the images."""
    for name, child in module.named_children():
        if type(child) is DropPath:
            setattr(module, name, KeyedDropPath(child.drop_prob, child.scale_by_keep))
        elif not isinstance(child, ExpertLayer):
            use_keyed_drop_path(child)


def draw_drop_path(module: nn.Module, seed: int, batch: Batch) -> None:
    """Give every layer its numbers of the batch's images and epochs."""
    layers = list(_layers(module))
    if layers:
        drawn = keyed_uniform(seed, Stream.DROP_PATH, batch.epochs, batch.rows, len(layers))
        for layer, numbers in zip(layers, drawn.unbind(1), strict=True):
            layer.numbers = numbers


def forget_drop_path(module: nn.Module) -> None:
    """Let every layer draw its own numbers again."""
    for layer in _layers(module):
        layer.numbers = None


def _layers(module: nn.Module) -> Iterator[KeyedDropPath]:
    return (layer for layer in module.modules() if isinstance(layer, KeyedDropPath))
