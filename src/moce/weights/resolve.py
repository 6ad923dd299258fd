"""What --mae and --init may name: a run of moce, a weights file or folder, or a timm model."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm

from moce.config import FileSettings, PretrainSettings, expand
from moce.config.facts import facts_of
from moce.config.usage import explicitly_set
from moce.errors import MoceError
from moce.models.encoder import nearest_model
from moce.models.mae import MAE, MAESpec
from moce.runtime.progress import log
from moce.weights.build import ModelOverrides, build_mae, read_weights
from moce.weights.formats.timm import pretrained
from moce.weights.from_runs import load_mae, moce_run
from moce.weights.types import MAEWeights

SIZES = frozenset({"img_size", "patch_size"})
COUNTS = SIZES | {"in_chans", "embed_dim", "depth", "num_heads"}
FIXED = frozenset({"num_classes", "global_pool", "fc_norm", "checkpoint_path", "cache_dir"})


def start_from(
    reference: str | Path, settings: FileSettings | PretrainSettings
) -> tuple[MAESpec, MAE]:
    """The model that `--mae` or `--init` names; notes on its weights go to stderr.

    Raises MoceError if there is none, or its weights do not fit.
    """
    path = expand(Path(reference))
    run = moce_run(path)
    if run is not None:
        refuse_given(settings, f"run {reference}")
        return load_mae(run)
    check_arguments(settings.model_args)
    if path.exists():
        return from_file(path, settings)[:2]
    if timm.is_model(str(reference)):
        if settings.weights_key is not None:
            raise MoceError(f"timm model {reference} is one network: leave out --weights-key")
        return from_timm(str(reference), settings)
    near = None if len(path.parts) > 1 or path.suffix else nearest_model(str(reference))
    hint = f"; did you mean '{near}'?" if near else ""
    raise MoceError(
        f"{reference} is not a moce run, a file or folder of weights, or the name of a timm model{hint}"
    )


def from_file(path: Path, settings: FileSettings | PretrainSettings) -> tuple[MAESpec, MAE, bool]:
    """The model of a file or folder of other libraries, and whether it has a decoder of its own."""
    weights = read_weights(path, settings.weights_key)
    if weights.decoder:
        refuse_given(settings, f"decoder in {path}", {"decoder"})
    return *_build(weights, overrides_of(settings)), bool(weights.decoder)


def from_timm(name: str, settings: FileSettings | PretrainSettings) -> tuple[MAESpec, MAE]:
    """A timm model with its own weights and a fresh decoder."""
    overrides = replace(overrides_of(settings), model=name)
    vit = pretrained(name, overrides.model_args)
    cfg: Any = vit.pretrained_cfg
    weights = MAEWeights(name, dict(vit.state_dict()), name=name, model_args=overrides.model_args)
    weights.mean, weights.std = tuple(cfg["mean"]), tuple(cfg["std"])
    return _build(weights, overrides)


def _build(weights: MAEWeights, overrides: ModelOverrides) -> tuple[MAESpec, MAE]:
    spec, mae, notes = build_mae(weights, overrides)
    for note in notes:
        log(note)
    return spec, mae


def overrides_of(settings: FileSettings | PretrainSettings) -> ModelOverrides:
    """The model settings that differ from their defaults."""
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
    """Raise MoceError if an argument would add a head, or a size or count is not an integer."""
    fixed = sorted(set(model_args) & FIXED)
    if fixed:
        raise MoceError(
            f"model_args must not set {fixed[0]}: the encoder returns tokens and has no head"
        )
    for name in COUNTS & model_args.keys():
        value = model_args[name]
        if value is None:  # the model's default
            continue
        values = value if name in SIZES and isinstance(value, list | tuple) else [value]
        if len(values) not in (1, 2) or not all(type(number) is int for number in values):
            what = "one number or [height, width]" if name in SIZES else "a number"
            raise MoceError(f"model_args: {name} must be {what}, not {value!r}")


def refuse_given(
    settings: FileSettings | PretrainSettings,
    origin: str,
    comes_with: Set[str] = frozenset({"run", "decoder"}),
) -> None:
    """Raise MoceError if a setting was given that `origin` determines, by its `comes_with`."""
    known = {n for n, facts in facts_of(settings).items() if facts.get("comes_with") in comes_with}
    unwanted = sorted(explicitly_set(settings) & known)
    if unwanted:
        raise MoceError(f"{unwanted[0]} comes from the {origin}; leave it out")
