"""facebookresearch/dinov2: timm's names except for registers, the giant's FFN and a mask token.

Released files hold the backbone alone. Training leaves a teacher beside a student (see
`weights.unwrap`), and blocks in chunks: `blocks.CHUNK.NUMBER.`, the number counted over all chunks.
"""

from __future__ import annotations

import re

from moce.weights.types import HEAD_PREFIXES, MAEWeights, RawWeights, Tensors, drop

LEFT_OUT = HEAD_PREFIXES | {
    "mask_token": "DINOv2's mask token, which only its own training uses",
}
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")


def matches(raw: RawWeights) -> bool:
    names = raw.tensors.keys()
    is_vit = {"cls_token", "patch_embed.proj.weight"} <= names
    marked = bool({"mask_token", "register_tokens"} & names)
    return is_vit and (marked or any(map(CHUNKED.match, names)))


def read(raw: RawWeights) -> MAEWeights:
    notes = list(raw.notes)
    tensors = drop(dict(raw.tensors), LEFT_OUT, notes)
    return MAEWeights(raw.path, to_timm(tensors), notes=notes)


def to_timm(tensors: Tensors) -> Tensors:
    """DINOv2's names and registers to timm's.

    timm's checkpoint_filter_fn renames w12, w3 and registers too, but into a given model; here the
    model is inferred from the renamed tensors.
    """
    renamed = {_name(k): v for k, v in tensors.items()}
    if "register_tokens" in renamed:
        # timm adds positions to patches only: the class token's position goes into the token itself.
        positions = renamed.pop("pos_embed")
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return renamed


def _name(name: str) -> str:
    name = CHUNKED.sub(r"blocks.\1.", name)
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
