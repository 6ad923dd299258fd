"""Transformers' DINOv2, with and without registers: folders in, as 4.x and 5.x write them.

Its names become those of facebookresearch/dinov2, which the adapter of that library then reads.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from moce.errors import MoceError
from moce.weights.formats import dinov2, transformers_vit
from moce.weights.types import Source, Tensors, Weights, drop

TYPES = ("dinov2", "dinov2_with_registers")
PREFIX = re.compile(r"^dinov2(?:_with_registers)?\.")
TO_THEIRS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
TO_OURS = {theirs: ours for ours, theirs in TO_THEIRS.items()}
FFN = {"weights_in": "w12", "weights_out": "w3", "down_proj": "w3"}
LAYER = re.compile(r"^encoder\.layer\.(\d+)\.(.+)$")


def matches(source: Source) -> bool:
    return source.config.get("model_type") in TYPES or any(
        name.endswith(".layer_scale1.lambda1") for name in source.tensors
    )


def read(source: Source) -> Weights:
    """Raises MoceError if the model computes what no plain ViT of timm does."""
    config, notes = source.config, list(source.notes)
    if config.get("hidden_act", "gelu") != "gelu":
        raise MoceError(f"{source.path} computes with {config['hidden_act']}; moce reads gelu only")
    tensors = {PREFIX.sub("", name): value for name, value in source.tensors.items()}
    tensors = drop(tensors, {"classifier.": "a classification head"}, notes)
    renamed = {_name(name): value for name, value in tensors.items()}
    joined = transformers_vit.join_attention(_join_ffn(renamed))
    weights = dinov2.read(Source(source.path, joined, notes=notes))
    said: dict[str, Any] = transformers_vit.preprocessing(source)
    return replace(weights, model_args=transformers_vit.model_args(config), **said)


def _name(name: str) -> str:
    layer = LAYER.match(name)
    return f"blocks.{layer[1]}.{_layer_name(layer[2])}" if layer else _renamed(name)


def _layer_name(name: str) -> str:
    name = re.sub(r"^layer_scale([12])\.lambda1$", r"ls\1.gamma", name)
    ffn = re.match(r"^mlp\.(\w+)\.", name)
    if ffn and ffn[1] in FFN:
        return f"mlp.{FFN[ffn[1]]}.{name[ffn.end() :]}"
    return transformers_vit.layer_name(name)


def _renamed(name: str) -> str:
    return transformers_vit.renamed(name, TO_OURS)


def _join_ffn(tensors: Tensors) -> Tensors:
    """Gate and value of a SwiGLU as one matrix, where 5.x keeps them apart in memory."""
    joined = {k: v for k, v in tensors.items() if not re.search(r"\.mlp\.(gate|up)_proj\.", k)}
    for name, gate in tensors.items():
        value = tensors.get(name.replace(".gate_proj.", ".up_proj."))
        if ".gate_proj." in name and value is not None:
            joined[name.replace(".gate_proj.", ".w12.")] = torch.cat([gate, value])
    return joined
