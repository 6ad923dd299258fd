"""timm's own files: its names as they are, with the config.json of a folder if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import VisionTransformer, save_for_hf

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec, input_shape
from moce.weights.types import HARMLESS, Source, Weights, drop

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


def write_timm_folder(folder: Path, vit: VisionTransformer, spec: EncoderSpec, **head: Any) -> None:
    """Write config.json and model.safetensors, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Pooling: the mean of the patch tokens after the final norm, moce's own feature, unless `head`
    (num_classes, global_pool, fc_norm: model arguments of a ViT with a head) says otherwise.
    """
    model = pooled(vit, spec, **head)
    try:
        save_for_hf(model, str(folder), safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot write {folder}: {error}") from None


def pooled(vit: VisionTransformer, spec: EncoderSpec, **head: Any) -> VisionTransformer:
    """A ViT of timm's with the weights of `vit`, its pooling and head, and how its images are made."""
    model = spec.build(**{"global_pool": "avg", "fc_norm": False, **head})
    model.load_state_dict(vit.state_dict())
    cfg: Any = model.pretrained_cfg
    kept = {k: v for k, v in cfg.items() if not k.startswith("test_")}
    how = {
        "pool_size": None,
        "input_size": input_shape(model),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    model.pretrained_cfg = {**kept, **how}  # type: ignore[assignment]
    return model
