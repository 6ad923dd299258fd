"""The masked autoencoder that a verb starts from: a run of moce, or weights of other libraries."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import FileSettings, PretrainSettings, expand
from moce.config.facts import facts_of
from moce.config.usage import explicitly_set
from moce.errors import MoceError
from moce.models.encoder import EncoderSpec, per_channel
from moce.models.mae import MAE, MAESpec
from moce.runs.model import CONFIG, INFO, WEIGHTS
from moce.runtime.progress import log
from moce.weights.build import ModelOverrides, build_mae, read_weights
from moce.weights.from_runs import load_mae

SIZES = frozenset({"img_size", "patch_size"})
COUNTS = SIZES | {"in_chans", "embed_dim", "depth", "num_heads"}
FIXED = frozenset({"num_classes", "global_pool", "fc_norm", "checkpoint_path", "cache_dir"})


def start_from(
    reference: str | Path, settings: FileSettings | PretrainSettings
) -> tuple[MAESpec, MAE]:
    """The model that `--mae` or `--init` names. What the user should hear of goes to stderr.

    Raises MoceError if there is none, or its weights do not fit.
    """
    path = expand(Path(reference))
    run = moce_run(path)
    if run is not None:
        refuse_given(settings, f"run {reference}")
        return load_mae(run)
    check_arguments(settings.model_args)
    if path.exists():
        spec, mae, _ = from_file(path, settings)
        return spec, mae
    if timm.is_model(str(reference)):
        return from_timm(str(reference), settings)
    raise MoceError(
        f"{reference} is not a moce run, nor a file or folder of weights, nor the name of a timm model"
    )


def from_file(path: Path, settings: FileSettings | PretrainSettings) -> tuple[MAESpec, MAE, bool]:
    """The model of a file or folder of other libraries, and whether its decoder came along."""
    weights = read_weights(path)
    if weights.decoder:
        refuse_given(settings, f"decoder in {path}", {"decoder"})
    spec, mae, notes = build_mae(weights, overrides_of(settings))
    for note in notes:
        log(note)
    return spec, mae, bool(weights.decoder)


def moce_run(path: Path) -> Path | None:
    """The run folder of moce that a path is, or is the weights of; None if it is of others."""
    folder = path.parent if path.name == WEIGHTS else path
    return folder if any((folder / name).is_file() for name in (INFO, CONFIG)) else None


def from_timm(name: str, settings: FileSettings | PretrainSettings) -> tuple[MAESpec, MAE]:
    """A timm model with its own weights and a fresh decoder."""
    overrides = overrides_of(settings)
    with torch.device("meta"):  # refuse what will not do before anything is downloaded
        EncoderSpec(name, overrides.model_args).build()
    try:
        vit = EncoderSpec(name, overrides.model_args).build(pretrained=True)
    except MoceError:
        raise
    except Exception as error:  # whatever the hub client raises when there is no network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoceError(f"cannot get timm's weights of {name}: {reason}") from None
    log(f"{name} has no decoder: it starts fresh")
    spec = timm_spec(vit, name, overrides)
    mae = spec.build()
    mae.encoder.load_state_dict(vit.state_dict())
    return spec, mae


def timm_spec(vit: VisionTransformer, name: str, overrides: ModelOverrides) -> MAESpec:
    """Pixels are normalized as timm's weights want it, unless the settings say otherwise."""
    cfg: Any = vit.pretrained_cfg
    mean = per_channel("mean", overrides.mean, tuple(cfg["mean"]), vit.in_chans)
    std = per_channel("std", overrides.std, tuple(cfg["std"]), vit.in_chans)
    encoder = EncoderSpec(name, overrides.model_args, mean, std)
    norm_pix = True if overrides.norm_pix is None else overrides.norm_pix
    return MAESpec(encoder, *overrides.decoder, overrides.mask_ratio or 0.75, norm_pix)


def overrides_of(settings: FileSettings | PretrainSettings) -> ModelOverrides:
    """What the settings ask of the model: only what was given counts as asked."""
    names = explicitly_set(settings) & {field.name for field in fields(ModelOverrides)}
    asked = {name: getattr(settings, name) for name in names}
    arguments = dict(settings.model_args)
    if settings.img_size is not None:
        arguments["img_size"] = settings.img_size
    form = [getattr(settings, f"decoder_{part}", None) for part in ("dim", "depth", "heads")]
    if None not in form:
        asked["decoder"] = tuple(form)
    return ModelOverrides(**{**asked, "model_args": arguments})


def check_arguments(model_args: dict[str, Any]) -> None:
    """Raise MoceError if an argument would give the encoder a head, or is no number where it has to be."""
    fixed = sorted(set(model_args) & FIXED)
    if fixed:
        raise MoceError(
            f"model_args must not set {fixed[0]}: the encoder gives tokens, with no head"
        )
    for name in COUNTS & model_args.keys():
        value = model_args[name]
        if value is None:  # timm's way to say: as the model has it
            continue
        values = value if name in SIZES and isinstance(value, list | tuple) else [value]
        if len(values) not in (1, 2) or not all(_is_count(number) for number in values):
            what = "one number or [height, width]" if name in SIZES else "a number"
            raise MoceError(f"model_args: {name} is {what}, not {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def refuse_given(
    settings: FileSettings | PretrainSettings,
    origin: str,
    comes_with: Set[str] = frozenset({"run", "decoder"}),
) -> None:
    """Raise MoceError if a setting was given that comes from the origin, by its `comes_with`."""
    known = {n for n, facts in facts_of(settings).items() if facts.get("comes_with") in comes_with}
    unwanted = sorted(explicitly_set(settings) & known)
    if unwanted:
        raise MoceError(f"{unwanted[0]} comes from the {origin}; leave it out")
