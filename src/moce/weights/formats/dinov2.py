"""facebookresearch/dinov2: timm's names but for registers, the FFN of the giant and a mask token.

Released files hold the backbone alone. Training leaves a teacher beside its heads, and blocks in
chunks: `blocks.CHUNK.NUMBER.`, the number counted over all chunks.
"""

from __future__ import annotations

import re

from moce.weights.types import HARMLESS, Source, Tensors, Weights, drop

BACKBONE = "backbone."
LEFT_OUT = {
    "mask_token": "DINOv2's mask token, which only its own training uses",
    "dino_head.": "DINO's projection head",
    "ibot_head.": "iBOT's projection head",
}
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")


def matches(source: Source) -> bool:
    names = {name.removeprefix(BACKBONE) for name in source.tensors}
    ours = {"cls_token", "patch_embed.proj.weight"} <= names
    marked = bool({"mask_token", "register_tokens"} & names)
    return ours and (marked or names != source.tensors.keys() or any(map(CHUNKED.match, names)))


def read(source: Source) -> Weights:
    notes = list(source.notes)
    tensors = {k.removeprefix(BACKBONE): v for k, v in source.tensors.items()}
    tensors = drop(tensors, LEFT_OUT | HARMLESS, notes)
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
    name = CHUNKED.sub(r"blocks.\1.", name)
    name = re.sub(r"^(blocks\.\d+\.mlp)\.w12\.", r"\1.fc1.", name)
    return re.sub(r"^(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2.", name)
