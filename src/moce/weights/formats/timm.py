"""timm's own files: its names unchanged, and the config.json of a folder if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from timm.models._hub import save_config_for_hf

from moce.errors import MoceError, raise_if_corrupt
from moce.models.encoder import EncoderSpec, input_shape
from moce.runs.files import atomic, write_tensors
from moce.runs.model import WEIGHTS
from moce.runtime.hub import NOT_HERE, cache_if_unreachable
from moce.runtime.launch import is_rank0
from moce.weights.types import HEAD_PREFIXES, MODEL_CONFIG, MAEWeights, RawWeights, Tensors, drop

HEAD_ARGS = frozenset({"num_classes", "global_pool", "fc_norm"})
# Of a head, or of how images of another size or dropout are treated: the weights do not depend on it.
NOT_OF_WEIGHTS = HEAD_ARGS | {
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    "drop_path_rate",
}
# Facts about the architecture. The rest of a pretrained_cfg (tag, url, license, class names) belongs
# to timm's own weights of that architecture.
ARCHITECTURE_CFG = ("architecture", "first_conv", "classifier", "fixed_input_size")
TAG = "moce"  # timm calls a model ARCHITECTURE.TAG


def matches(raw: RawWeights) -> bool:
    return "patch_embed.proj.weight" in raw.tensors or "architecture" in raw.config


def read(raw: RawWeights) -> MAEWeights:
    notes = list(raw.notes)
    stated = stated_by_config(raw)
    tensors = drop(dict(raw.tensors), HEAD_PREFIXES, notes)
    tensors, name, arguments = (
        keep_distillation(tensors, notes),
        stated["name"],
        stated["model_args"],
    )
    built = _built(name, arguments)
    if built is not None and not _fits(built, tensors):
        # Older versions of timm do not store how a model differs from its name, and DeiT with
        # distillation is a class of its own.
        stated["name"] = None
        if built.embed_dim == tensors["patch_embed.proj.weight"].shape[0]:
            arguments.setdefault("num_heads", built.blocks[0].attn.num_heads)
    return MAEWeights(raw.path, tensors, notes=notes, **stated)


def stated_by_config(raw: RawWeights) -> dict[str, Any]:
    """name, model_args, mean and std by timm's config.json; None and {} without one."""
    with raise_if_corrupt(Path(raw.path) / MODEL_CONFIG):
        cfg = dict(raw.config.get("pretrained_cfg") or {})
        arguments = dict(raw.config.get("model_args") or {})
        name = raw.config.get("architecture")
        return {
            "name": None if name is None else str(name),
            "model_args": {k: v for k, v in arguments.items() if k not in NOT_OF_WEIGHTS},
            "mean": tuple(cfg["mean"]) if "mean" in cfg else None,
            "std": tuple(cfg["std"]) if "std" in cfg else None,
        }


def keep_distillation(tensors: Tensors, notes: list[str]) -> Tensors:
    """DeiT's distillation token as a register, which it equals: a token beside the class token."""
    if "dist_token" in tensors:
        notes.append("DeiT's distillation token is kept as a register: features are DeiT's own")
        tensors["reg_token"] = tensors.pop("dist_token")
    return tensors


def _built(name: str | None, arguments: dict[str, Any]) -> Any:
    """timm's model of that name without memory; None if the builder will say what is wrong."""
    if name is None or not timm.is_model(name):
        return None
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **{"num_classes": 0, **arguments})
    except Exception:  # timm checks few arguments
        return None
    return model if isinstance(model, VisionTransformer) else None


def _fits(model: VisionTransformer, tensors: Tensors) -> bool:
    """Whether a model has these shapes, as far as it has their names, and the registers."""
    own = model.state_dict()
    registers = "reg_token" in own or "reg_token" not in tensors
    return registers and all(own[k].shape == v.shape for k, v in tensors.items() if k in own)


def pretrained(name: str, model_args: dict[str, Any]) -> VisionTransformer:
    """A timm model with the weights that timm has for it.

    Raises MoceError if it is no suitable ViT (before any download) or the download fails.
    """
    spec = EncoderSpec(name, model_args)
    with torch.device("meta"):
        spec.build()
    with cache_if_unreachable() as online:
        try:
            return spec.build(pretrained=True)
        except MoceError:
            raise
        except Exception as error:  # without a network the hub client raises errors of many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = reason if online else NOT_HERE
            raise MoceError(f"cannot get the weights of timm model {name}: {reason}") from None


def write_timm_folder(
    folder: Path,
    vit: VisionTransformer,
    spec: EncoderSpec,
    label_names: Sequence[str] | None = None,
) -> None:
    """Write config.json and model.safetensors, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The model pools the mean of the patch tokens after the final norm, moce's own feature, unless
    `vit` has a head. label_names: of its classes, in order. Raises MoceError if the folder cannot be
    written.
    """
    head = head_args(vit) if vit.num_classes else {}
    model = pooled(vit, spec, **head)
    write_tensors(folder / WEIGHTS, dict(model.state_dict()), {"format": "pt"})
    if is_rank0():
        with atomic(folder / MODEL_CONFIG) as temporary:
            named = {"label_names": list(label_names)} if label_names else None
            save_config_for_hf(model, str(temporary), named)


def head_args(vit: VisionTransformer) -> dict[str, Any]:
    """The arguments that give a timm ViT the head of `vit`, a classifier of pooled patch tokens."""
    return {"num_classes": vit.num_classes, "global_pool": "avg", "fc_norm": True}


def pooled(vit: VisionTransformer, spec: EncoderSpec, **head: Any) -> VisionTransformer:
    """A timm ViT with the weights of `vit`, with pooling or a head, and its own pretrained_cfg.

    A head that `vit` lacks is new.
    """
    model = spec.build(**{"global_pool": "avg", "fc_norm": False, **head})
    missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
    new = [name for name in missing if not name.startswith("head.")]
    assert not new and not unexpected, (new, unexpected)  # the architectures are the same
    base: Any = model.pretrained_cfg
    cfg = {name: base.get(name) for name in ARCHITECTURE_CFG}
    cfg |= {
        "tag": TAG,
        "num_classes": model.num_classes,
        "input_size": input_shape(model),
        "pool_size": None,
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    return model
