"""facebookresearch/mae: the encoder has timm's names; the decoder is renamed both ways."""

from __future__ import annotations

from moce.weights.formats.timm import stated_by_config
from moce.weights.types import HEAD_PREFIXES, MAEWeights, RawWeights, Tensors, drop

DECODER_HEADS = 16  # of all released models; tensor shapes do not show it
TO_FACEBOOK = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed": "decoder_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}
FROM_FACEBOOK = {theirs: ours for ours, theirs in TO_FACEBOOK.items()}


def matches(raw: RawWeights) -> bool:
    return any(
        name.startswith(("decoder_embed.", "decoder_blocks.", "decoder_pred."))
        for name in raw.tensors
    )


def read(raw: RawWeights) -> MAEWeights:
    """An encoder, and a decoder if the file has one."""
    encoder, decoder = split(raw.tensors)
    notes, stated = list(raw.notes), stated_by_config(raw)
    return MAEWeights(raw.path, drop(encoder, HEAD_PREFIXES, notes), decoder, notes=notes, **stated)


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Encoder and decoder, the latter by moce's names."""
    encoder, decoder = {}, {}
    for name, value in tensors.items():
        if name.partition(".")[0] in FROM_FACEBOOK:
            decoder[_renamed(name, FROM_FACEBOOK)] = value
        else:
            encoder[name] = value
    return encoder, decoder


def join(encoder: Tensors, decoder: Tensors) -> Tensors:
    """The inverse of `split`."""
    return encoder | {_renamed(name, TO_FACEBOOK): value for name, value in decoder.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name with its first component replaced."""
    first, dot, rest = name.partition(".")
    return table[first] + dot + rest
