"""moce's own weights file: facebookresearch's names, and in the header what tensors cannot say.

`moce convert` and `moce export --format torch` write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_tensors
from moce.weights.formats import mae as facebook
from moce.weights.types import Source, Weights

HEADER = "moce"
SAID = ("name", "model_args", "mean", "std", "decoder_heads", "mask_ratio", "norm_pix")


def matches(source: Source) -> bool:
    return HEADER in source.header


def read(source: Source) -> Weights:
    try:
        said: dict[str, Any] = json.loads(source.header[HEADER])
        known = {name: said[name] for name in SAID}
    except (ValueError, KeyError, TypeError) as error:
        raise MoceError(f"the header of {source.path} is damaged: {error!r}") from None
    for name in ("mean", "std"):
        known[name] = tuple(known[name]) if known[name] else None
    return Weights(source.path, *facebook.split(source.tensors), **known)


def describe(weights: Weights) -> dict[str, Any]:
    """What the format or the user said of the model, as JSON."""
    return {name: getattr(weights, name) for name in SAID}


def write(path: Path, weights: Weights) -> None:
    """Write one safetensors file. Raises MoceError if it cannot be written."""
    tensors = facebook.join(weights.encoder, weights.decoder)
    write_tensors(path, tensors, {"format": "pt", HEADER: json.dumps(describe(weights))})


def of_model(spec: EncoderSpec, vit: VisionTransformer, mae: MAE | None = None) -> Weights:
    """The weights of an encoder, or of `mae` whose encoder it is, with all that a header can say."""
    weights = Weights(spec.name, dict(vit.state_dict()), {}, spec.name, spec.model_args)
    weights.mean, weights.std = tuple(spec.mean), tuple(spec.std)
    if mae is not None:
        block: Any = mae.decoder.blocks[0]
        weights.decoder = dict(mae.decoder.state_dict())
        weights.decoder_heads = block.attn.num_heads
        weights.mask_ratio, weights.norm_pix = mae.mask_ratio, mae.norm_pix
    return weights
