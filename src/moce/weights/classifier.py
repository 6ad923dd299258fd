"""Fine-tuned models, head included: runs of `moce finetune`, and files of other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moce.errors import raise_if_corrupt
from moce.models.encoder import EncoderSpec
from moce.runs.model import INFO
from moce.weights.build import ModelOverrides, build_encoder, is_fine_tuned, to_mae_weights
from moce.weights.export import Model
from moce.weights.formats.timm import HEAD_ARGS
from moce.weights.read import read_raw
from moce.weights.types import HEAD_PREFIXES

HEAD = "head."


def read_classifier(
    path: Path, overrides: ModelOverrides, key: str | None = None
) -> tuple[Model, list[str]] | None:
    """A ViT that classifies the normed mean of its patch tokens, and notes; None if it is no such.

    Its class names are those of model.json, or label_names of timm's config.json, or numbers.
    """
    raw = read_raw(path, key)
    weights = to_mae_weights(raw)
    head = {k: v.float() for k, v in raw.tensors.items() if k.startswith(HEAD)}
    if head.keys() != {"head.weight", "head.bias"} or not is_fine_tuned(weights):
        return None
    made, encoder, notes = build_encoder(weights, overrides)
    with raise_if_corrupt(path):
        arguments = {k: v for k, v in made.model_args.items() if k not in HEAD_ARGS}
        spec = EncoderSpec(made.name, arguments, made.mean, made.std)
        count = len(head["head.weight"])
        vit = spec.build(num_classes=count, global_pool="avg", fc_norm=True)
        vit.load_state_dict({**encoder.state_dict(), **head})
    about = _about(path)
    classes = _names(about.get("classes") or raw.config.get("label_names"), count)
    notes = [note for note in notes if HEAD_PREFIXES[HEAD] not in note]
    multi_label = bool(about.get("multi_label", False))
    return Model(spec, vit.eval(), classes=classes, multi_label=multi_label), notes


def _about(path: Path) -> dict[str, Any]:
    """model.json of a run; {} of other folders and files."""
    file = (path if path.is_dir() else path.parent) / INFO
    if not file.is_file():
        return {}
    with raise_if_corrupt(file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _names(stated: Any, count: int) -> list[str]:
    if isinstance(stated, dict):  # timm's form where numbers have gaps
        return [str(stated.get(str(number), number)) for number in range(count)]
    if isinstance(stated, list) and len(stated) == count:
        return [str(name) for name in stated]
    return [str(number) for number in range(count)]
