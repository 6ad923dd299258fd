"""From weights of any format to a masked autoencoder; whatever does not fit is an error, or said."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed

from moce.errors import MoceError, raise_if_corrupt
from moce.models.encoder import RGB, EncoderSpec, per_channel
from moce.models.mae import MAE, MAESpec
from moce.weights.architecture import architecture_of, depth_of, pair
from moce.weights.formats import dinov2, transformers_dinov2, transformers_vit
from moce.weights.formats import mae as facebook
from moce.weights.formats import moce as own
from moce.weights.formats import timm as timm_files
from moce.weights.read import read_source
from moce.weights.types import Source, Tensors, Weights

# The first that matches reads.
ADAPTERS = (own, transformers_dinov2, transformers_vit, facebook, dinov2, timm_files)
LISTED = 8  # names in a message


@dataclass(frozen=True)
class ModelOverrides:
    """What the user asks of the model beside the weights; None: as the weights have it.

    decoder: width, blocks and heads of a fresh one; decoder_heads: of one in the weights;
    allow_missing, allow_unexpected: patterns of names that may be wanting (those stay fresh) or left
    over.
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


def read_weights(path: Path) -> Weights:
    """The weights of a file or folder. Raises MoceError if no adapter knows its names."""
    return translate(read_source(path))


def translate(source: Source) -> Weights:
    """Weights by moce's names. Raises MoceError if no adapter knows the source's."""
    for adapter in ADAPTERS:
        if adapter.matches(source):
            with raise_if_corrupt(Path(source.path)):
                return adapter.read(source)
    names = ", ".join(sorted(source.tensors)[:LISTED])
    raise MoceError(
        f"{source.path} holds no weights that moce knows (a ViT of timm, facebookresearch/mae, "
        f"DINOv2, or Transformers' ViT, ViTMAE and DINOv2), but {names} ..."
    )


def build_mae(weights: Weights, overrides: ModelOverrides) -> tuple[MAESpec, MAE, list[str]]:
    """A masked autoencoder with these weights, and what the user should hear of.

    Without a decoder in `weights` it gets a fresh one. Raises MoceError if weights are missing or
    left over that `wishes` does not allow, or do not fit.
    """
    if any(pattern and not pattern.strip("*") for pattern in overrides.allow_missing):
        raise MoceError(
            "--allow-missing '*' would start any weight fresh; name those that may be missing, such "
            "as 'norm.*'"
        )
    with raise_if_corrupt(Path(weights.path)):
        name, arguments = _architecture(weights, overrides)
        spec = _spec(weights, overrides, name, {**arguments, **overrides.model_args})
        mae = spec.build()
    notes = list(weights.notes)
    tensors = {f"encoder.{key}": value for key, value in weights.encoder.items()}
    tensors |= {f"decoder.{key}": value for key, value in weights.decoder.items()}
    wanted = mae.state_dict()
    if weights.decoder and not (overrides.decoder_heads or weights.decoder_heads):
        notes.append(
            f"decoder with {facebook.DECODER_HEADS} attention heads, as all released ones have "
            "(--decoder-heads says otherwise)"
        )
    if not weights.decoder:
        notes.append(f"{weights.path} has no decoder: it starts fresh")
        wanted = {key: value for key, value in wanted.items() if key.startswith("encoder.")}
    grid = _grid(weights, arguments)
    wanted = _resample_patches(tensors, mae, wanted, notes)
    _resample(tensors, mae, grid, notes)
    _check_names(tensors, wanted, weights.path, overrides, notes)
    _load(mae, {key: value for key, value in tensors.items() if key in wanted}, weights.path)
    return spec, mae, notes


def _architecture(weights: Weights, overrides: ModelOverrides) -> tuple[str, dict[str, Any]]:
    """The timm name and arguments that the weights were made with."""
    name = overrides.model or weights.name
    if name is not None:
        return name, weights.model_args if name == weights.name else {}
    given = {**overrides.model_args, **weights.model_args}
    name, arguments = architecture_of(weights.encoder, weights.path, given)
    return name, {**arguments, **weights.model_args}


def _spec(
    weights: Weights, overrides: ModelOverrides, name: str, arguments: dict[str, Any]
) -> MAESpec:
    encoder = EncoderSpec(name, arguments)
    channels = int(arguments.get("in_chans", RGB))
    mean = per_channel("mean", overrides.mean, weights.mean or encoder.mean, channels)
    std = per_channel("std", overrides.std, weights.std or encoder.std, channels)
    norm_pix = weights.norm_pix if overrides.norm_pix is None else overrides.norm_pix
    return MAESpec(
        EncoderSpec(name, arguments, mean, std),
        *_decoder_form(weights, overrides),
        mask_ratio=overrides.mask_ratio or weights.mask_ratio or 0.75,
        norm_pix=True if norm_pix is None else norm_pix,
    )


def _decoder_form(weights: Weights, overrides: ModelOverrides) -> tuple[int, int, int]:
    """Width, blocks and heads of the decoder: read off its tensors, or as wished for."""
    if not weights.decoder:
        return overrides.decoder
    embed = weights.decoder.get("embed.weight")
    if embed is None:
        raise MoceError(f"the decoder in {weights.path} is not whole: it has no embedding")
    depth = depth_of(weights.decoder)
    heads = overrides.decoder_heads or weights.decoder_heads or facebook.DECODER_HEADS
    return embed.shape[0], depth, heads


def _grid(weights: Weights, arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches that the positions are for, where it is said; None: a square."""
    patch = weights.encoder.get("patch_embed.proj.weight")
    if patch is None or "img_size" not in arguments:
        return None
    height, width = pair(arguments["img_size"])
    return height // patch.shape[-2], width // patch.shape[-1]


def _resample_patches(tensors: Tensors, mae: MAE, wanted: Tensors, notes: list[str]) -> Tensors:
    """Bring the patch embedding to the model's patch, in place; what is wanted of `tensors` then.

    The decoder's last layer predicts the pixels of a patch, and starts fresh if that has changed.
    """
    name, head = "encoder.patch_embed.proj.weight", "decoder.head."
    weight, new = tensors.get(name), tuple(mae.encoder.patch_embed.patch_size)
    if weight is None or weight.dim() != 4 or tuple(weight.shape[2:]) == new:
        return wanted
    old = "x".join(map(str, weight.shape[2:]))
    tensors[name] = resample_patch_embed(weight.float(), list(new))
    notes.append(f"patch embedding resampled from {old} to {new[0]}x{new[1]} pixels")
    if any(key.startswith(head) for key in tensors):
        notes.append(f"the decoder's last layer predicts patches of {old} pixels: it starts fresh")
        for key in [key for key in tensors if key.startswith(head)]:
            del tensors[key]
        wanted = {key: value for key, value in wanted.items() if not key.startswith(head)}
    return wanted


def _resample(tensors: Tensors, mae: MAE, grid: tuple[int, int] | None, notes: list[str]) -> None:
    """Bring position embeddings to the model's grid of patches, in place."""
    vit = mae.encoder
    own = {"encoder.pos_embed": 0 if vit.no_embed_class else vit.num_prefix_tokens}
    own["decoder.pos_embed"] = vit.num_prefix_tokens
    new = tuple(vit.patch_embed.grid_size)
    for name, prefix in own.items():
        positions = tensors.get(name)
        if positions is None:
            continue
        old = _fitting(grid, positions.shape[1] - prefix)
        if old is None or old == new:
            continue
        tensors[name] = resample_abs_pos_embed(positions, list(new), list(old), prefix)
        notes.append(f"{name} resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches")


def _fitting(grid: tuple[int, int] | None, patches: int) -> tuple[int, int] | None:
    """`grid` if it has so many patches, else the square that has; None if there is none."""
    if grid is not None and grid[0] * grid[1] == patches:
        return grid
    side = math.isqrt(max(patches, 0))
    return (side, side) if side * side == patches else None


def _check_names(
    tensors: Tensors, wanted: Tensors, path: str, overrides: ModelOverrides, notes: list[str]
) -> None:
    """Raise MoceError unless the names agree or the user allows that they do not."""
    missing = _sort_out(wanted.keys() - tensors.keys(), overrides.allow_missing)
    surplus = _sort_out(tensors.keys() - wanted.keys(), overrides.allow_unexpected)
    complaints = []
    if missing[False]:
        complaints.append(f"missing: {_listed(missing[False])} (--allow-missing PATTERN)")
    if surplus[False]:
        complaints.append(f"left over: {_listed(surplus[False])} (--allow-unexpected PATTERN)")
    if complaints:
        raise MoceError(f"the weights of {path} do not fit; {'; '.join(complaints)}")
    if missing[True]:
        notes.append(f"missing, so they start fresh: {_listed(missing[True])}")
    if surplus[True]:
        notes.append(f"left over, so not used: {_listed(surplus[True])}")


def _sort_out(names: Iterable[str], patterns: tuple[str, ...]) -> dict[bool, list[str]]:
    """Names that some pattern allows (True), and the others; 'encoder.' may be left out of one."""
    sorted_out: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(names):
        forms = (name, name.removeprefix("encoder."))
        sorted_out[any(fnmatchcase(f, p) for f in forms for p in patterns)].append(name)
    return sorted_out


def _listed(names: list[str]) -> str:
    """Names as the files have them, at most some."""
    shown = [name.removeprefix("encoder.") for name in names[:LISTED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _load(mae: MAE, tensors: Tensors, path: str) -> None:
    """Load what is there. Raises MoceError naming the shapes that differ, and then loads nothing."""
    own = mae.state_dict()
    wrong = [
        f"{name.removeprefix('encoder.')} {list(value.shape)}, not {list(own[name].shape)}"
        for name, value in tensors.items()
        if value.shape != own[name].shape
    ]
    if wrong:
        raise MoceError(
            f"the weights of {path} do not fit the model: {'; '.join(wrong[:3])}; "
            "see --model, --model-args"
        )
    mae.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
