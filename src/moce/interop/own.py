"""moce's own weights file: facebookresearch's names, and in the header what tensors cannot say.

`moce convert` and `moce export --format torch` write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moce.errors import MoceError
from moce.interop import facebook
from moce.interop.weights import Source, Weights
from moce.runs import write_tensors

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
    said = {"name": weights.name, "model_args": weights.model_args, "mean": weights.mean}
    said |= {"std": weights.std, "decoder_heads": weights.decoder_heads}
    return said | {"mask_ratio": weights.mask_ratio, "norm_pix": weights.norm_pix}


def write(path: Path, weights: Weights) -> None:
    """Write one safetensors file. Raises MoceError if it cannot be written."""
    tensors = facebook.join(weights.encoder, weights.decoder)
    write_tensors(path, tensors, {"format": "pt", HEADER: json.dumps(describe(weights))})
