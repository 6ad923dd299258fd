"""facebookresearch/dinov2: timm's names but for registers, the FFN of the giant and a mask token."""

from __future__ import annotations

import re

from moce.interop.weights import HARMLESS, Source, Tensors, Weights, drop

MASK_TOKEN = {"mask_token": "DINOv2's mask token, which only its own training uses"}


def matches(source: Source) -> bool:
    names = source.tensors
    ours = {"cls_token", "patch_embed.proj.weight"} <= names.keys()
    return ours and bool({"mask_token", "register_tokens"} & names.keys())


def read(source: Source) -> Weights:
    notes = list(source.notes)
    tensors = drop(dict(source.tensors), MASK_TOKEN | HARMLESS, notes)
    if "register_tokens" in tensors:
        tensors = _registers(tensors)
    return Weights(source.path, {_name(k): v for k, v in tensors.items()}, notes=notes)


def _registers(tensors: Tensors) -> Tensors:
    """timm adds positions to patches only; the class token's own is added to the token itself."""
    positions = tensors.pop("pos_embed")
    tensors["reg_token"] = tensors.pop("register_tokens")
    tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
    tensors["pos_embed"] = positions[:, 1:]
    return tensors


def _name(name: str) -> str:
    name = re.sub(r"^(blocks\.\d+\.mlp)\.w12\.", r"\1.fc1.", name)
    return re.sub(r"^(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2.", name)
