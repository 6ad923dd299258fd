"""Weights as a file has them (RawWeights), and by the names of moce's own models (MAEWeights)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]
MODEL_CONFIG = "config.json"  # of folders of timm and Transformers
HEAD_PREFIXES = {
    "head.": "a classification head",
    "head_dist.": "a distillation head",
    "pre_logits.": "a layer before the classification head",
    "attn_pool.": "an attention pooling",
}


@dataclass
class RawWeights:
    """Tensors by the names in their file, and the files next to it.

    path: origin, for messages; header: metadata of a safetensors file; config, processor:
    config.json and preprocessor_config.json of the same folder; notes: what reading left out.
    """

    path: str
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    processor: dict[str, Any] = field(default_factory=dict)


@dataclass
class MAEWeights:
    """Weights by moce's names, and what their file states about the model (None: not stated).

    encoder: names of a timm VisionTransformer, and any name that the format does not know;
    decoder: names of `moce.models.decoder.Decoder`, empty if the file has none; name, model_args: a
    timm architecture; notes: messages for the user.
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


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """A name after all replacements of regular expressions, in order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def drop(tensors: Tensors, prefixes: dict[str, str], notes: list[str]) -> Tensors:
    """The tensors without those of the given prefixes; adds a note for each prefix found."""
    for prefix, description in prefixes.items():
        if any(name.startswith(prefix) for name in tensors):
            notes.append(f"left out {description} ({prefix.rstrip('.')})")
            tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    return tensors
