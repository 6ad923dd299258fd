"""facebookresearch/mae: the encoder has timm's names; the decoder's are translated both ways."""

from __future__ import annotations

import re

from moce.weights.types import HARMLESS, Source, Tensors, Weights, drop

DECODER_HEADS = 16  # of all released models; cannot be seen in the tensors
TO_THEIRS = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed": "decoder_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}
TO_OURS = {theirs: ours for ours, theirs in TO_THEIRS.items()}


def matches(source: Source) -> bool:
    return any(re.match(r"decoder_(embed|blocks|pred)\.", name) for name in source.tensors)


def read(source: Source) -> Weights:
    """An encoder, and the decoder if there is one."""
    encoder, decoder = split(source.tensors)
    notes = list(source.notes)
    encoder = drop(encoder, HARMLESS, notes)
    return Weights(source.path, encoder, decoder, notes=notes)


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Encoder and decoder, the latter by moce's names."""
    encoder, decoder = {}, {}
    for name, value in tensors.items():
        if name.partition(".")[0] in TO_OURS:
            decoder[_renamed(name, TO_OURS)] = value
        else:
            encoder[name] = value
    return encoder, decoder


def join(encoder: Tensors, decoder: Tensors) -> Tensors:
    """The inverse of `split`."""
    return encoder | {_renamed(name, TO_THEIRS): value for name, value in decoder.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name with its first part, up to a dot, as the table has it."""
    first, dot, rest = name.partition(".")
    return table[first] + dot + rest
