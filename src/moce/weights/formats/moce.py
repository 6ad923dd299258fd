"""moce's own weights file: facebookresearch/mae's names, and in the header what tensors do not show.

`moce convert` and `moce export --format torch` write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from moce.errors import MoceError, raise_if_corrupt
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_tensors
from moce.weights.formats import mae as facebook
from moce.weights.formats.timm import HEAD_ARGS
from moce.weights.types import HEAD_PREFIXES, MAEWeights, RawWeights, drop

HEADER = "moce"
FIELDS = ("name", "model_args", "mean", "std", "decoder_heads", "mask_ratio", "norm_pix")


def matches(raw: RawWeights) -> bool:
    return HEADER in raw.header


def read(raw: RawWeights) -> MAEWeights:
    try:
        header: dict[str, Any] = json.loads(raw.header[HEADER])
        fields = {name: header[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError) as error:
        raise MoceError(f"the header of {raw.path} is corrupt: {error!r}") from None
    for name in ("mean", "std"):
        fields[name] = tuple(fields[name]) if fields[name] else None
    with raise_if_corrupt(Path(raw.path)):
        arguments = dict(fields["model_args"])
        fields["model_args"] = {k: v for k, v in arguments.items() if k not in HEAD_ARGS}
    encoder, decoder = facebook.split(raw.tensors)
    notes = list(raw.notes)
    return MAEWeights(raw.path, drop(encoder, HEAD_PREFIXES, notes), decoder, notes=notes, **fields)


def describe(weights: MAEWeights) -> dict[str, Any]:
    """What is known about the model beyond its tensors, as JSON."""
    return {name: getattr(weights, name) for name in FIELDS}


def write(path: Path, weights: MAEWeights) -> None:
    """Write one safetensors file. Raises MoceError if it cannot be written."""
    tensors = facebook.join(weights.encoder, weights.decoder)
    write_tensors(path, tensors, {"format": "pt", HEADER: json.dumps(describe(weights))})


def weights_of(spec: EncoderSpec, vit: VisionTransformer, mae: MAE | None = None) -> MAEWeights:
    """The weights of an encoder, or of the `mae` that it belongs to, with all header fields."""
    weights = MAEWeights(spec.name, dict(vit.state_dict()), {}, spec.name, spec.model_args)
    weights.mean, weights.std = tuple(spec.mean), tuple(spec.std)
    if mae is not None:
        block: Any = mae.decoder.blocks[0]
        weights.decoder = dict(mae.decoder.state_dict())
        weights.decoder_heads = block.attn.num_heads
        weights.mask_ratio, weights.norm_pix = mae.mask_ratio, mae.norm_pix
    return weights
