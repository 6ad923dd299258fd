"""Weights of any format to an MAE: rename, resample, check. A mismatch is an error unless allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moce.errors import MoceError, raise_if_corrupt
from moce.models.encoder import RGB, EncoderSpec, per_channel
from moce.models.mae import MAE, MAESpec
from moce.weights.architecture import count_blocks, infer_architecture, pair
from moce.weights.formats import dinov2, transformers
from moce.weights.formats import mae as facebook
from moce.weights.formats import moce as own
from moce.weights.formats import timm as timm_format
from moce.weights.read import read_raw
from moce.weights.types import MAEWeights, RawWeights, Tensors

FORMATS = (own, transformers, facebook, dinov2, timm_format)  # the first that matches reads
LISTED = 8  # names in a message
ENCODER, DECODER = "encoder.", "decoder."


@dataclass(frozen=True)
class ModelOverrides:
    """The user's settings of the model beside its weights (None: as the weights have it).

    decoder: width, blocks and heads of a fresh one; decoder_heads: of one in the weights;
    allow_missing, allow_unexpected: glob patterns of names that may be missing (those weights start
    fresh) or unexpected (not used).
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mask_ratio: float | None = None
    norm_pix: bool | None = None
    decoder: tuple[int, int, int] = (512, 8, 16)
    decoder_heads: int | None = None
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


def read_weights(path: Path, key: str | None = None) -> MAEWeights:
    """The weights of a file or folder; key: which of several networks in it.

    Raises MoceError if no format matches its names.
    """
    return to_mae_weights(read_raw(path, key))


def to_mae_weights(raw: RawWeights) -> MAEWeights:
    """The weights by moce's names. Raises MoceError if no format matches."""
    for adapter in FORMATS:
        if adapter.matches(raw):
            with raise_if_corrupt(Path(raw.path)):
                return adapter.read(raw)
    names = ", ".join(sorted(raw.tensors)[:LISTED])
    raise MoceError(
        f"{raw.path} holds no weights that moce can read (a ViT of timm, facebookresearch/mae, "
        f"DINOv2, or Transformers' ViT, ViTMAE and DINOv2), but {names} ..."
    )


def build_mae(weights: MAEWeights, overrides: ModelOverrides) -> tuple[MAESpec, MAE, list[str]]:
    """A masked autoencoder with these weights, and notes for the user.

    If `weights` have no decoder, a fresh one is added. Raises MoceError if shapes differ, or if
    weights are missing or unexpected that `overrides` does not allow.
    """
    _check_overrides(weights, overrides)
    notes = list(weights.notes)
    with raise_if_corrupt(Path(weights.path)):
        name, arguments = _architecture(weights, overrides, notes)
        encoder = _encoder_spec(
            weights, overrides, name, {**arguments, **overrides.model_args}, notes
        )
        spec = _mae_spec(encoder, weights, overrides)
        mae = spec.build()
    tensors = {f"{ENCODER}{key}": value for key, value in weights.encoder.items()}
    tensors |= {f"{DECODER}{key}": value for key, value in weights.decoder.items()}
    old_patch = _resample_patches(tensors, mae.encoder, notes)
    _resample_positions(tensors, mae.encoder, _grid(weights, arguments), notes)
    fresh = _fresh_prefixes(weights, overrides, old_patch, notes)
    _fill(mae, tensors, weights.path, overrides, notes, fresh)
    return spec, mae, notes


def build_encoder(
    weights: MAEWeights, overrides: ModelOverrides
) -> tuple[EncoderSpec, VisionTransformer, list[str]]:
    """The encoder of these weights, and notes for the user; a decoder is left out.

    That of a fine-tuned model has its norm after pooling (`fc_norm`), if it was trained so. Raises
    MoceError as `build_mae`.
    """
    _check_overrides(weights, overrides)
    notes = list(weights.notes)
    with raise_if_corrupt(Path(weights.path)):
        name, arguments = _architecture(weights, overrides, notes)
        whole = {**arguments, **overrides.model_args}
        if is_fine_tuned(weights):
            whole["fc_norm"] = True
        spec = _encoder_spec(weights, overrides, name, whole, notes)
        vit = spec.build()
    tensors = {f"{ENCODER}{key}": value for key, value in weights.encoder.items()}
    _resample_patches(tensors, vit, notes)
    _resample_positions(tensors, vit, _grid(weights, arguments), notes)
    _fill(nn.ModuleDict({"encoder": vit}), tensors, weights.path, overrides, notes)
    return spec, vit, notes


def is_fine_tuned(weights: MAEWeights) -> bool:
    """Whether the encoder's norm comes after pooling, as in classifiers."""
    return "fc_norm.weight" in weights.encoder and "norm.weight" not in weights.encoder


def _check_overrides(weights: MAEWeights, overrides: ModelOverrides) -> None:
    if any(pattern and not pattern.strip("*") for pattern in overrides.allow_missing):
        raise MoceError(
            "--allow-missing '*' would let every weight start fresh; name those that may be missing, "
            "such as 'norm.*'"
        )


def _fill(
    module: nn.Module,
    tensors: Tensors,
    path: str,
    overrides: ModelOverrides,
    notes: list[str],
    fresh: tuple[str, ...] = (),
) -> None:
    """Load the tensors, but those of the prefixes `fresh`, after all checks; adds notes."""
    tensors = {name: value for name, value in tensors.items() if not name.startswith(fresh)}
    expected = {name for name in module.state_dict() if not name.startswith(fresh)}
    _check_names(tensors.keys(), expected, path, overrides, notes)
    _load(module, {name: v for name, v in tensors.items() if name in expected}, path)


def _fresh_prefixes(
    weights: MAEWeights, overrides: ModelOverrides, old_patch: str | None, notes: list[str]
) -> tuple[str, ...]:
    """Prefixes of the weights that start fresh whatever the file has; adds notes on the decoder."""
    if not weights.decoder:
        notes.append(f"{weights.path} has no decoder: it starts fresh")
        return ("decoder.",)
    if not (overrides.decoder_heads or weights.decoder_heads):
        notes.append(
            f"decoder with {facebook.DECODER_HEADS} attention heads, as in all released models "
            "(change it by --decoder-heads)"
        )
    if not old_patch:
        return ()
    notes.append(
        f"the decoder's last layer predicts patches of {old_patch} pixels: it starts fresh"
    )
    return ("decoder.head.",)


def _architecture(
    weights: MAEWeights, overrides: ModelOverrides, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The timm name and arguments that the weights were made with."""
    name = overrides.model or weights.name
    if name is not None:
        return name, weights.model_args if name == weights.name else {}
    given = {**overrides.model_args, **weights.model_args}
    name, arguments = infer_architecture(weights.encoder, weights.path, given, notes)
    return name, {**arguments, **weights.model_args}


def _encoder_spec(
    weights: MAEWeights,
    overrides: ModelOverrides,
    name: str,
    arguments: dict[str, Any],
    notes: list[str],
) -> EncoderSpec:
    encoder = EncoderSpec(name, arguments)
    channels = int(arguments.get("in_chans", RGB))
    mean = per_channel("mean", overrides.mean, weights.mean or encoder.mean, channels)
    std = per_channel("std", overrides.std, weights.std or encoder.std, channels)
    if overrides.mean is None and weights.mean is None:
        notes.append(
            f"{weights.path} does not say how images were normalized: mean {_numbers(mean)}, std "
            f"{_numbers(std)} are assumed"
        )
    return EncoderSpec(name, arguments, mean, std)


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in dict.fromkeys(values))


def _mae_spec(encoder: EncoderSpec, weights: MAEWeights, overrides: ModelOverrides) -> MAESpec:
    norm_pix = weights.norm_pix if overrides.norm_pix is None else overrides.norm_pix
    return MAESpec(
        encoder,
        *_decoder_form(weights, overrides),
        mask_ratio=overrides.mask_ratio or weights.mask_ratio or 0.75,
        norm_pix=True if norm_pix is None else norm_pix,
    )


def _decoder_form(weights: MAEWeights, overrides: ModelOverrides) -> tuple[int, int, int]:
    """Width, blocks and heads of the decoder: from its tensors, or as in `overrides`."""
    if not weights.decoder:
        return overrides.decoder
    embed = weights.decoder.get("embed.weight")
    if embed is None:
        raise MoceError(f"the decoder in {weights.path} is incomplete: it has no embedding")
    heads = overrides.decoder_heads or weights.decoder_heads or facebook.DECODER_HEADS
    return embed.shape[0], count_blocks(weights.decoder), heads


# Patches and positions are resampled here and not by timm's checkpoint_filter_fn: it takes the old
# grid from the model's defaults, not from the file, and reports nothing.


def _resample_patches(tensors: Tensors, vit: VisionTransformer, notes: list[str]) -> str | None:
    """Resample the patch embedding to the model's patch, in place; the old size if it differed."""
    name = "encoder.patch_embed.proj.weight"
    weight, new = tensors.get(name), tuple(vit.patch_embed.patch_size)
    if weight is None or weight.dim() != 4 or tuple(weight.shape[2:]) == new:
        return None
    old = "x".join(map(str, weight.shape[2:]))
    tensors[name] = resample_patch_embed(weight.float(), list(new))
    notes.append(f"patch embedding resampled from {old} to {new[0]}x{new[1]} pixels")
    return old


def _grid(weights: MAEWeights, arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches that the positions are for, if stated."""
    patch = weights.encoder.get("patch_embed.proj.weight")
    if patch is None or "img_size" not in arguments:
        return None
    height, width = pair(arguments["img_size"])
    return height // patch.shape[-2], width // patch.shape[-1]


def _resample_positions(
    tensors: Tensors, vit: VisionTransformer, grid: tuple[int, int] | None, notes: list[str]
) -> None:
    """Resample position embeddings from `grid` (None: a square) to the model's, in place."""
    prefixes = {
        "encoder.pos_embed": 0 if vit.no_embed_class else vit.num_prefix_tokens,
        "decoder.pos_embed": vit.num_prefix_tokens,
    }
    new = tuple(vit.patch_embed.grid_size)
    for name, prefix in prefixes.items():
        if name not in tensors:
            continue
        patches = tensors[name].shape[1] - prefix
        side = math.isqrt(max(patches, 0))
        old = grid if grid and grid[0] * grid[1] == patches else (side, side)
        if patches < 1 or old[0] * old[1] != patches or old == new:
            continue
        tensors[name] = resample_abs_pos_embed(tensors[name], list(new), list(old), prefix)
        notes.append(f"{name} resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches")


def _check_names(
    found: Iterable[str],
    expected: set[str],
    path: str,
    overrides: ModelOverrides,
    notes: list[str],
) -> None:
    """Raise MoceError if names are missing or unexpected that the user does not allow."""
    found = set(found)
    refused = []
    for kind, names, patterns, consequence in (
        ("missing", expected - found, overrides.allow_missing, "they start fresh"),
        ("unexpected", found - expected, overrides.allow_unexpected, "not used"),
    ):
        allowed = {name for name in names if _allowed(name, patterns)}
        if names - allowed:
            refused.append(f"{kind}: {_listed(names - allowed)} (--allow-{kind} PATTERN)")
        if allowed:
            notes.append(f"{kind}, so {consequence}: {_listed(allowed)}")
    if (
        refused
        and {"encoder.norm.weight"} <= expected - found
        and "encoder.fc_norm.weight" in found
    ):
        raise MoceError(
            f"{path} is fine-tuned: its last norm comes after pooling, so no masked autoencoder can "
            "start from it; give the backbone that it was made from, or let a new norm start: "
            "--allow-missing 'norm.*' --allow-unexpected 'fc_norm.*'"
        )
    if refused:
        raise MoceError(f"the weights of {path} do not fit; {'; '.join(refused)}")


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the name, with or without 'encoder.'."""
    return any(fnmatchcase(n, p) for n in (name, name.removeprefix("encoder.")) for p in patterns)


def _listed(names: set[str]) -> str:
    """The first names in order, as in the file."""
    shown = [name.removeprefix("encoder.") for name in sorted(names)[:LISTED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _load(module: nn.Module, tensors: Tensors, path: str) -> None:
    """Load the tensors given. Raises MoceError, with the shapes that differ, before it loads any."""
    own_tensors = module.state_dict()
    wrong = [
        f"{name.removeprefix('encoder.')} {list(value.shape)}, not {list(own_tensors[name].shape)}"
        for name, value in tensors.items()
        if value.shape != own_tensors[name].shape
    ]
    if wrong:
        raise MoceError(
            f"the weights of {path} do not fit the model: {'; '.join(wrong[:3])}; "
            "see --model, --model-args"
        )
    module.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
