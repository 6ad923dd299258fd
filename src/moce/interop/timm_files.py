"""timm's own files: its names as they are, with the config.json of a folder if there is one."""

from __future__ import annotations

from typing import Any

from moce.interop.weights import HARMLESS, Source, Weights, drop

OF_THE_HEAD = frozenset({"num_classes", "global_pool", "fc_norm"})


def matches(source: Source) -> bool:
    return "patch_embed.proj.weight" in source.tensors or "architecture" in source.config


def read(source: Source) -> Weights:
    notes = list(source.notes)
    encoder = drop(dict(source.tensors), HARMLESS, notes)
    config: dict[str, Any] = source.config
    cfg = config.get("pretrained_cfg") or {}
    arguments = dict(config.get("model_args") or {})
    return Weights(
        source.path,
        encoder,
        name=config.get("architecture"),
        model_args={k: v for k, v in arguments.items() if k not in OF_THE_HEAD},
        mean=tuple(cfg["mean"]) if "mean" in cfg else None,
        std=tuple(cfg["std"]) if "std" in cfg else None,
        notes=notes,
    )
