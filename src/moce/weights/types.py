"""What every adapter reads weights into: timm's names for the encoder, `models/mae.py`'s for the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]
HARMLESS = {
    "head.": "a classification head",
    "pre_logits.": "a layer before the classification head",
    "attn_pool.": "an attention pooling",
}


@dataclass
class Source:
    """Tensors as they lie in a file, and what lies beside them.

    config, processor: config.json and preprocessor_config.json of the same folder; header: metadata
    of a safetensors file; path: where it comes from, for messages; notes: what was left out while
    reading.
    """

    path: str
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    processor: dict[str, Any] = field(default_factory=dict)


@dataclass
class Weights:
    """Weights by moce's names, and what their format says of the model (None: it does not say).

    encoder: names of a timm VisionTransformer, and any name the adapter does not know (surplus);
    decoder: names of `moce.models.mae.Decoder`, empty if the file has none; name, model_args: a
    timm architecture; notes: what the user should hear of.
    """

    path: str
    encoder: Tensors
    decoder: Tensors = field(default_factory=dict)
    name: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    decoder_heads: int | None = None
    mask_ratio: float | None = None
    norm_pix: bool | None = None
    notes: list[str] = field(default_factory=list)


def drop(tensors: Tensors, prefixes: dict[str, str], notes: list[str]) -> Tensors:
    """The tensors without those of these prefixes; what was dropped is added to `notes`."""
    for prefix, what in prefixes.items():
        if any(name.startswith(prefix) for name in tensors):
            notes.append(f"left out {what} ({prefix.rstrip('.')})")
            tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    return tensors
