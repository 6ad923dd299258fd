"""Transformers' ViT, ViTMAE, DeiT and DINOv2 (with or without registers): folders in.

Three ways of naming are read: what 4.x writes, what 5.x writes, and what 5.x has in memory. The
names become those of facebookresearch/mae and facebookresearch/dinov2.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from moce.errors import MoceError
from moce.models.encoder import RGB
from moce.weights.architecture import pair
from moce.weights.formats import dinov2
from moce.weights.formats import mae as facebook
from moce.weights.formats.timm import keep_distillation
from moce.weights.types import MAEWeights, RawWeights, Tensors, drop, rename

TYPES = ("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers")
EPS = 1e-6  # of timm's norms and the original MAE; Transformers' default of 1e-12 is not MAE's
# What a config.json may leave out, because it is Transformers' default.
DEFAULTS: dict[str, Any] = {"num_attention_heads": 12, "image_size": 224}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "vit": {"layer_norm_eps": 1e-12},
    "deit": {"layer_norm_eps": 1e-12},
    "vit_mae": {
        "layer_norm_eps": 1e-12,
        "decoder_num_attention_heads": 16,
        "mask_ratio": 0.75,
        "norm_pix_loss": False,
    },
}
MODEL_PREFIX = re.compile(r"^(?:vit|deit|dinov2|dinov2_with_registers)\.")
LEFT_OUT = {
    "cls_classifier.": "a classification head",
    "distillation_classifier.": "a distillation head",
    "classifier.": "a classification head",
    "pooler.": "a pooler",
    "embeddings.mask_token": "a mask token that the encoder does not use",
}
# Applied in this order; the FFN's output.dense after attention's.
RENAMES = (
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.(?:decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.(?=decoder_|mask_token)", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(?=cls_token|register_tokens)", ""),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
)
CONCATENATED = {  # projections that timm computes with one matrix
    ".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."),
    ".mlp.w12.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def matches(raw: RawWeights) -> bool:
    return "model_type" in raw.config or any(
        MODEL_PREFIX.sub("", name).startswith("embeddings.patch_embeddings.")
        for name in raw.tensors
    )


def read(raw: RawWeights) -> MAEWeights:
    """Raises MoceError for other model types, and for activations other than GELU."""
    config, notes = raw.config, list(raw.notes)
    _check_config(config, raw.path)
    if "model_type" in config:
        config = {**DEFAULTS, **DEFAULTS_OF.get(config["model_type"], {}), **config}
    if config.get("layer_norm_eps", EPS) != EPS:
        notes.append(f"norms use eps {EPS}, the config says {config['layer_norm_eps']}")
    tensors = {MODEL_PREFIX.sub("", name): value for name, value in raw.tensors.items()}
    tensors = drop(tensors, LEFT_OUT, notes)
    tensors = _concatenate({rename(name, RENAMES): value for name, value in tensors.items()})
    encoder, decoder = facebook.split(keep_distillation(tensors, notes))
    return MAEWeights(
        raw.path,
        dinov2.to_timm(encoder),
        decoder,
        model_args=_model_args(config),
        decoder_heads=config.get("decoder_num_attention_heads"),
        mask_ratio=config.get("mask_ratio"),
        norm_pix=config.get("norm_pix_loss"),
        notes=notes,
        **_preprocessing(raw),
    )


def _check_config(config: dict[str, Any], path: str) -> None:
    kind = config.get("model_type", TYPES[0])
    if kind not in TYPES:
        known = f"{', '.join(TYPES[:-1])} and {TYPES[-1]}"
        raise MoceError(f"{path} is a '{kind}' of Transformers; moce reads {known}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise MoceError(f"{path} uses the activation {config['hidden_act']}; moce reads gelu only")


def _model_args(config: dict[str, Any]) -> dict[str, Any]:
    """timm arguments that tensors do not show: the number of heads and the image size."""
    arguments: dict[str, Any] = {}
    if "num_attention_heads" in config:
        arguments["num_heads"] = config["num_attention_heads"]
    if "image_size" in config:
        arguments["img_size"] = list(pair(config["image_size"]))
    return arguments


def _preprocessing(raw: RawWeights) -> dict[str, Any]:
    """mean and std of the image processor in the same folder; 0 and 1 if it does not normalize."""
    processor = raw.processor
    if not processor.get("do_normalize", True):
        channels = int(raw.config.get("num_channels", RGB))
        return {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    values = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    return {name: tuple(value) for name, value in values.items() if isinstance(value, list)}


def _concatenate(tensors: Tensors) -> Tensors:
    """One matrix for queries, keys and values, and one for gate and value of a SwiGLU."""
    for whole, parts in CONCATENATED.items():
        for first in [name for name in tensors if parts[0] in name]:
            found = [tensors.pop(first.replace(parts[0], part)) for part in parts]
            tensors[first.replace(parts[0], whole)] = torch.cat(found)
    return tensors
