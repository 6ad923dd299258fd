"""What can be read off an encoder's tensors: width, depth, patch, channels, image size, kind of FFN."""

from __future__ import annotations

import math
from typing import Any

from moce.errors import MoceError
from moce.weights.types import Tensors

SIZES = {
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}
PLAIN, SWIGLU = "vit_base_patch16_224", "vit_giant_patch14_reg4_dinov2"
HEAD_WIDTH, HUGE = 64, {1280: 16}  # heads cannot be seen; ViT-H has 16 of width 80


def architecture_of(
    encoder: Tensors, path: str, given: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """A timm name and arguments for it that build an encoder with exactly these tensors.

    given: arguments of the user, for what tensors do not tell. Raises MoceError, with what to
    give, where neither does.
    """
    try:
        patch = encoder["patch_embed.proj.weight"]
        hidden = encoder["blocks.0.mlp.fc1.weight"].shape[0]
        inner = encoder["blocks.0.mlp.fc2.weight"].shape[1]
    except KeyError as error:
        raise MoceError(f"{path} is no plain ViT that moce knows: it has no {error}") from None
    if "norm_pre.weight" in encoder:
        raise MoceError(f"{path} has a norm before the blocks, as CLIP: name it by --model")
    width, depth = patch.shape[0], depth_of(encoder)
    glu = hidden == 2 * inner
    name = SWIGLU if glu else SIZES.get((width, depth), PLAIN)
    height, breadth = patch.shape[-2:]
    arguments: dict[str, Any] = {
        "patch_size": height if height == breadth else [height, breadth],
        "embed_dim": width,
        "depth": depth,
        "num_heads": given.get("num_heads") or heads_of(width, path),
        "mlp_ratio": ratio_of(hidden, width),
        **_switches(encoder),
    }
    if patch.shape[1] != 3:
        arguments["in_chans"] = patch.shape[1]
    arguments |= _positions(encoder, arguments, path, given)
    return name, arguments


def depth_of(tensors: Tensors) -> int:
    """How many blocks there are."""
    return 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))


def heads_of(width: int, path: str) -> int:
    """The number of heads by convention. Raises MoceError where there is none."""
    if width in HUGE:
        return HUGE[width]
    if width % HEAD_WIDTH:
        raise MoceError(
            f"{path}: the number of attention heads cannot be seen in weights of width {width}; "
            "give it by --model-args '{\"num_heads\": N}'"
        )
    return width // HEAD_WIDTH


def ratio_of(hidden: int, width: int) -> float:
    """A ratio of which timm makes exactly this hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _switches(encoder: Tensors) -> dict[str, Any]:
    """What a ViT has or has not. timm takes None for "as the name says", so 0 switches off."""
    registers = encoder.get("reg_token")
    return {
        "qkv_bias": "blocks.0.attn.qkv.bias" in encoder,
        "proj_bias": "blocks.0.attn.proj.bias" in encoder,
        "qk_norm": "blocks.0.attn.q_norm.weight" in encoder,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in encoder else 0.0,
        "class_token": "cls_token" in encoder,
        "reg_tokens": 0 if registers is None else registers.shape[1],
    }


def _positions(
    encoder: Tensors, arguments: dict[str, Any], path: str, given: dict[str, Any]
) -> dict[str, Any]:
    """Image size, and whether prefix tokens have positions."""
    if "pos_embed" not in encoder:
        raise MoceError(f"{path} has no absolute position embedding, which masking needs")
    count = encoder["pos_embed"].shape[1]
    prefix = int(arguments["class_token"]) + arguments["reg_tokens"]
    patch = pair(arguments["patch_size"])
    # Positions for patches only: 9 with a class token may be a row of 8 patches as well as 3x3.
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
        f"{path} is of images that are not square; give their size by "
        "--model-args '{\"img_size\": [HEIGHT, WIDTH]}'"
    )


def pair(value: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
