"""facebookresearch/mae: the encoder has timm's names; the decoder's are translated both ways."""

from __future__ import annotations

import re

from moce.interop.weights import HARMLESS, Source, Tensors, Weights, drop

DECODER_HEADS = 16  # of all released models; cannot be seen in the tensors
TO_OURS = [
    (r"^mask_token$", "mask_token"),
    (r"^decoder_pos_embed$", "pos_embed"),
    (r"^decoder_embed\.", "embed."),
    (r"^decoder_blocks\.", "blocks."),
    (r"^decoder_norm\.", "norm."),
    (r"^decoder_pred\.", "head."),
]
TO_THEIRS = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed": "decoder_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}


def matches(source: Source) -> bool:
    return any(re.match(r"decoder_(embed|blocks|pred)\.", name) for name in source.tensors)


def read(source: Source) -> Weights:
    """An encoder, and the decoder if there is one."""
    encoder, decoder = split(source.tensors)
    notes = list(source.notes)
    encoder = drop(encoder, HARMLESS, notes)
    notes.append(
        f"decoder with {DECODER_HEADS} attention heads, as all released ones have"
        " (--decoder-heads says otherwise)"
    )
    return Weights(source.path, encoder, decoder, notes=notes)


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Encoder and decoder, the latter by moce's names."""
    encoder, decoder = {}, {}
    for name, value in tensors.items():
        for pattern, ours in TO_OURS:
            if re.match(pattern, name):
                decoder[re.sub(pattern, ours, name)] = value
                break
        else:
            encoder[name] = value
    return encoder, decoder


def join(encoder: Tensors, decoder: Tensors) -> Tensors:
    """The inverse of `split`."""
    renamed = {}
    for name, value in decoder.items():
        first, _, rest = name.partition(".")
        renamed[".".join(filter(None, (TO_THEIRS[first], rest)))] = value
    return {**encoder, **renamed}
