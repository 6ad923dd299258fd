"""timm architecture inferred from tensor shapes: width, depth, patch, channels, image size, FFN."""

from __future__ import annotations

import math
from typing import Any

from moce.errors import MoceError
from moce.weights.types import Tensors

NAMES = {  # by width and depth
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}
PLAIN, SWIGLU = "vit_base_patch16_224", "vit_giant_patch14_reg4_dinov2"
HEAD_WIDTH, HEADS = 64, {1280: 16}  # shapes do not show heads; ViT-H has 16 of width 80


def infer_architecture(
    encoder: Tensors, path: str, given: dict[str, Any], notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """A timm name and model arguments that build an encoder with exactly these tensors.

    encoder: tensors by timm's names; path: their origin, for messages; given: the user's model
    arguments, for what shapes do not show; notes: gets a line on what is guessed. Raises MoceError,
    with the argument to give, if neither shows it.
    """
    try:
        patch = encoder["patch_embed.proj.weight"]
        hidden = encoder["blocks.0.mlp.fc1.weight"].shape[0]
        inner = encoder["blocks.0.mlp.fc2.weight"].shape[1]
    except KeyError as error:
        raise MoceError(f"{path} is not a plain ViT: it has no {error}") from None
    if "norm_pre.weight" in encoder:
        raise MoceError(f"{path} has a norm before the blocks, like CLIP: give its name by --model")
    width, depth = patch.shape[0], count_blocks(encoder)
    swiglu = hidden == 2 * inner
    name = SWIGLU if swiglu else NAMES.get((width, depth), PLAIN)
    height, breadth = patch.shape[-2:]
    registers = encoder.get("reg_token")
    # timm reads None as "the default of this name", so 0 switches LayerScale off.
    arguments: dict[str, Any] = {
        "patch_size": height if height == breadth else [height, breadth],
        "embed_dim": width,
        "depth": depth,
        "num_heads": given.get("num_heads") or _guess_heads(width, path, notes),
        "mlp_ratio": _mlp_ratio(hidden, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in encoder,
        "proj_bias": "blocks.0.attn.proj.bias" in encoder,
        "qk_norm": "blocks.0.attn.q_norm.weight" in encoder,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in encoder else 0.0,
        "class_token": "cls_token" in encoder,
        "reg_tokens": 0 if registers is None else registers.shape[1],
    }
    if patch.shape[1] != 3:
        arguments["in_chans"] = patch.shape[1]
    return name, arguments | _image_size(encoder, arguments, path, given)


def count_blocks(tensors: Tensors) -> int:
    return 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))


def _guess_heads(width: int, path: str, notes: list[str]) -> int:
    """The usual number of heads for a width. Raises MoceError if there is none."""
    if width not in HEADS and width % HEAD_WIDTH:
        raise MoceError(
            f"{path}: weights of width {width} do not show the number of attention heads; give it by "
            "--model-args '{\"num_heads\": N}', here or to moce convert"
        )
    heads = HEADS.get(width) or width // HEAD_WIDTH
    notes.append(
        f"{heads} attention heads, as usual for width {width}: a guess, since weights do not show it "
        "(--model-args '{\"num_heads\": N}', here or to moce convert)"
    )
    return heads


def _mlp_ratio(hidden: int, width: int) -> float:
    """A ratio for which timm, which rounds down, builds exactly this hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _image_size(
    encoder: Tensors, arguments: dict[str, Any], path: str, given: dict[str, Any]
) -> dict[str, Any]:
    """Image size, and whether positions are for patches only (no_embed_class)."""
    if "pos_embed" not in encoder:
        raise MoceError(f"{path} has no absolute position embedding, which masking needs")
    count = encoder["pos_embed"].shape[1]
    prefix = int(arguments["class_token"]) + arguments["reg_tokens"]
    patch = pair(arguments["patch_size"])
    # With a class token alone it is ambiguous: 9 positions may be 3x3 patches or one token and 4x2.
    may_be_bare = arguments["reg_tokens"] > 0 or given.get("no_embed_class", False)
    for bare in (False, True) if may_be_bare else (False,):
        patches = count - (0 if bare else prefix)
        side = math.isqrt(max(patches, 0))
        size = pair(given["img_size"]) if "img_size" in given else None
        if size and (size[0] // patch[0]) * (size[1] // patch[1]) == patches:
            return {"img_size": list(size), "no_embed_class": bare}
        if side * side == patches and side:
            return {"img_size": [side * patch[0], side * patch[1]], "no_embed_class": bare}
    raise MoceError(
        f"{path} was trained on images that are not square; give their size by "
        "--model-args '{\"img_size\": [HEIGHT, WIDTH]}', here or to moce convert"
    )


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a size that may be a single number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
