"""Transformers' ViTMAE and ViT: folders of config.json and model.safetensors, both ways.

Three ways of naming are read: what 4.x writes, what 5.x writes, and what 5.x has in memory. Written
is what 4.x writes, which all of them load.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_json, write_tensors
from moce.runs.model import WEIGHTS
from moce.weights.architecture import pair
from moce.weights.formats import mae as facebook
from moce.weights.types import Source, Tensors, Weights, drop

ATTENTION = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v"}
LAYER = [
    (r"^attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.", "attn.{}."),
    (r"^attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"^layernorm_before\.", "norm1."),
    (r"^layernorm_after\.", "norm2."),
    (r"^(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"^(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
]
TO_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
ENCODER = {theirs: ours for ours, theirs in TO_ENCODER.items()}
LEFT_OUT = {
    "classifier.": "a classification head",
    "pooler.": "a pooler",
    "embeddings.mask_token": "a mask token that the encoder does not use",
}
TYPES = ("vit", "vit_mae")
EPS = 1e-6  # of timm's norms and of the original MAE; Transformers' default of 1e-12 is not MAE's


# --- in -----------------------------------------------------------------------------------------


def matches(source: Source) -> bool:
    return "model_type" in source.config or any(
        name.removeprefix("vit.").startswith("embeddings.patch_embeddings.")
        for name in source.tensors
    )


def read(source: Source) -> Weights:
    """Raises MoceError for models of Transformers that are neither ViT nor ViTMAE."""
    config, notes = source.config, list(source.notes)
    _check_config(config, source.path)
    tensors = {name.removeprefix("vit."): value for name, value in source.tensors.items()}
    tensors = drop(tensors, LEFT_OUT, notes)
    encoder, decoder = {}, {}
    for name, value in tensors.items():
        if name.startswith("decoder."):
            decoder[_decoder_name(name.removeprefix("decoder."))] = value
        else:
            encoder[_encoder_name(name)] = value
    if config.get("layer_norm_eps", EPS) != EPS:
        notes.append(f"norms use eps {EPS}, the config says {config['layer_norm_eps']}")
    return Weights(
        source.path,
        join_attention(encoder),
        join_attention(decoder),
        model_args=model_args(config),
        decoder_heads=config.get("decoder_num_attention_heads", 16),
        mask_ratio=config.get("mask_ratio"),
        norm_pix=config.get("norm_pix_loss"),
        notes=notes,
        **preprocessing(source),
    )


def model_args(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the model that its tensors do not: heads, and the size of the images."""
    arguments: dict[str, Any] = {}
    if "num_attention_heads" in config:
        arguments["num_heads"] = config["num_attention_heads"]
    if "image_size" in config:
        arguments["img_size"] = list(pair(config["image_size"]))
    return arguments


def preprocessing(source: Source) -> dict[str, Any]:
    """mean and std of the image processor beside the weights, if there is one that normalizes."""
    processor = source.processor
    if not processor.get("do_normalize", True):
        return {}
    said = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    return {name: tuple(value) for name, value in said.items() if isinstance(value, list)}


def _check_config(config: dict[str, Any], path: str) -> None:
    kind = config.get("model_type", TYPES[0])
    if kind not in TYPES:
        raise MoceError(
            f"{path} is a '{kind}' of Transformers; moce reads {', '.join(TYPES)}, dinov2 and "
            "dinov2_with_registers"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise MoceError(f"{path} computes with {config['hidden_act']}; moce reads gelu only")


def _encoder_name(name: str) -> str:
    layer = re.match(r"^(?:encoder\.layer|layers)\.(\d+)\.(.+)$", name)
    return f"blocks.{layer[1]}.{layer_name(layer[2])}" if layer else renamed(name, ENCODER)


def _decoder_name(name: str) -> str:
    layer = re.match(r"^(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+)$", name)
    return f"blocks.{layer[1]}.{layer_name(layer[2])}" if layer else renamed(name, facebook.TO_OURS)


def layer_name(name: str) -> str:
    for pattern, ours in LAYER:
        found = re.match(pattern, name)
        if found:
            part = ATTENTION.get(found[1], "") if found.groups() else ""
            return ours.format(part) + name[found.end() :]
    return name


def renamed(name: str, table: dict[str, str]) -> str:
    """The name with its module, up to weight or bias, as the table has it; as it is if not there."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    return table.get(module, module) + name[len(module) :]


def join_attention(tensors: Tensors) -> Tensors:
    """timm projects to queries, keys and values by one matrix."""
    joined = {k: v for k, v in tensors.items() if not re.search(r"\.attn\.[qkv]\.", k)}
    for name in tensors:
        if ".attn.q." in name:
            parts = [tensors.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            if all(part is not None for part in parts):
                whole = torch.cat([part for part in parts if part is not None])
                joined[name.replace(".attn.q.", ".attn.qkv.")] = whole
    return joined


# --- out ----------------------------------------------------------------------------------------

TO_LAYER = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def write_vit(folder: Path, vit: VisionTransformer, spec: EncoderSpec) -> None:
    """A folder for `ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)`.

    Raises MoceError, naming the part, if ViTModel has no room for part of the encoder.
    """
    check_vit(vit, "ViTModel")
    config = {"architectures": ["ViTModel"], "model_type": "vit", **_config(vit)}
    write_json(folder / "config.json", config)
    _write_processor(folder, vit, spec)
    write_tensors(folder / WEIGHTS, _their_encoder(vit, ""), {"format": "pt"})


def write_mae(folder: Path, mae: MAE, spec: EncoderSpec) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained(FOLDER)`. Raises MoceError as `write_vit`."""
    check_mae(mae)
    vit, decoder = mae.encoder, mae.decoder
    block: Any = decoder.blocks[0]
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_config(vit),
        "decoder_hidden_size": decoder.embed.out_features,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": mae.mask_ratio,
        "norm_pix_loss": mae.norm_pix,
    }
    theirs = {}
    for name, value in _split_attention(dict(decoder.state_dict())).items():
        theirs["decoder." + _their_name(name, "decoder_layers", facebook.TO_THEIRS)] = value
    write_json(folder / "config.json", config)
    _write_processor(folder, vit, spec)
    write_tensors(folder / WEIGHTS, {**_their_encoder(vit, "vit."), **theirs}, {"format": "pt"})


def check_mae(mae: MAE) -> None:
    """Raise MoceError if ViTMAEForPreTraining has no room for the model."""
    vit = mae.encoder
    check_vit(vit, "ViTMAEForPreTraining")
    (height, width), patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if height != width or patch[0] != patch[1]:
        raise MoceError(
            f"ViTMAE takes square images and patches, not {height}x{width} in patches of "
            f"{patch[0]}x{patch[1]}; export it as torch"
        )
    norm: Any = vit.norm
    if norm.eps != EPS:
        raise MoceError(f"ViTMAE has one eps for all norms; here they differ ({norm.eps}, {EPS})")


def check_vit(vit: VisionTransformer, what: str) -> None:
    """Raise MoceError, naming it, if the encoder has a part that `what` of Transformers has not."""
    block: Any = vit.blocks[0]
    parts = {
        "registers": vit.reg_token is not None,
        "no class token": vit.cls_token is None,
        "positions for patches only": vit.no_embed_class,
        "LayerScale": hasattr(block.ls1, "gamma"),
        "normed queries and keys": hasattr(block.attn.q_norm, "weight"),
        f"an FFN of type {type(block.mlp).__name__}": type(block.mlp).__name__ != "Mlp",
        "a norm before the blocks": hasattr(vit.norm_pre, "weight"),
        "no norm after the blocks": not hasattr(vit.norm, "bias"),
        "projections without bias": block.attn.proj.bias is None or block.mlp.fc1.bias is None,
        "an activation that is not GELU": type(getattr(block.mlp, "act", None)).__name__ != "GELU",
    }
    found = [name for name, there in parts.items() if there]
    if found:
        raise MoceError(
            f"{what} of Transformers has no room for this encoder: {', '.join(found)}; "
            "export it as timm, torch or onnx"
        )


def _config(vit: VisionTransformer) -> dict[str, Any]:
    block: Any = vit.blocks[0]
    norm: Any = vit.norm
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": norm.eps,
        "image_size": _side(vit.patch_embed.img_size),
        "patch_size": _side(vit.patch_embed.patch_size),
        "num_channels": vit.in_chans,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _side(size: Any) -> int | list[int]:
    """One number for a square."""
    height, width = pair(size)
    return height if height == width else [height, width]


def _write_processor(folder: Path, vit: VisionTransformer, spec: EncoderSpec) -> None:
    height, width = vit.patch_embed.img_size
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    write_json(folder / "preprocessor_config.json", content)


def _their_encoder(vit: VisionTransformer, prefix: str) -> Tensors:
    tensors = _split_attention(dict(vit.state_dict()))
    return {prefix + _their_name(k, "encoder.layer", TO_ENCODER): v for k, v in tensors.items()}


def _their_name(name: str, layers: str, rest: dict[str, str]) -> str:
    block = re.match(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
    if block:
        return f"{layers}.{block[1]}.{TO_LAYER[block[2]]}.{block[3]}"
    return renamed(name, rest)


def _split_attention(tensors: Tensors) -> Tensors:
    split = {k: v for k, v in tensors.items() if ".attn.qkv." not in k}
    for name, value in tensors.items():
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                split[name.replace("qkv", part)] = third
    return split
