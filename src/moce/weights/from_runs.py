"""From run folders and names back to models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce.config import ClusterPooling, expand
from moce.errors import MoceError, raise_if_corrupt
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE, MAESpec
from moce.models.moce import MoCE, MoCESpec
from moce.models.token_moe import TokenExpertFFN, TokenMoESpec, copy_experts
from moce.runs.files import read_tensors
from moce.runs.model import INFO, read_info, read_model

BACKBONE_CONFIG = "config.json"


def load_mae(run: Path) -> tuple[MAESpec, MAE]:
    """The masked autoencoder of a `moce pretrain` (or MAE+) run."""
    info, tensors = read_model(run, "mae")
    with raise_if_corrupt(run / INFO):
        spec = MAESpec.from_dict(info["spec"])
        mae = spec.build()
        _check_mae(spec, mae)
    load_weights(mae, tensors, run)
    return spec, mae


def _check_mae(spec: MAESpec, mae: MAE) -> None:
    """Raise ValueError if a spec holds numbers that nothing would stumble over before a loss does."""
    _check_encoder(spec.encoder, mae.encoder)
    if not 0 < spec.mask_ratio < 1:
        raise ValueError(f"a mask_ratio of {spec.mask_ratio}")


def _check_encoder(spec: EncoderSpec, vit: VisionTransformer) -> None:
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != vit.in_chans or not all(isinstance(v, int | float) for v in values):
            raise ValueError(f"{name} {list(values)} for {vit.in_chans} channels")
    if min(spec.std) <= 0:
        raise ValueError(f"std {list(spec.std)}")


def load_clusters(run: Path) -> ClusterModel:
    """The cluster model of a `moce cluster` run."""
    info, tensors = read_model(run, "clusters")
    return _clusters_of(run, tensors, info)


def _clusters_of(run: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> ClusterModel:
    with raise_if_corrupt(run / INFO):
        clusters = ClusterModel.from_tensors(tensors, info["clusters"])
        _check_encoder(clusters.spec, clusters.encoder)
        if clusters.pooling not in get_args(ClusterPooling):
            raise ValueError(f"pooling {clusters.pooling!r}")
        if not (clusters.epsilon > 0 and -1 <= clusters.similarity <= 1):
            raise ValueError(f"epsilon {clusters.epsilon}, similarity {clusters.similarity}")
    return clusters


def load_moce(run: Path) -> tuple[MoCESpec, MoCE, ClusterModel]:
    """The mixture and the cluster model of a `moce train` run."""
    info, tensors = read_model(run, "moce")
    with raise_if_corrupt(run / INFO):
        spec = MoCESpec.from_dict(info["spec"])
        model = spec.build()
        _check_mae(spec.mae, model.mae)
    load_weights(model, under("model.", tensors), run)
    return spec, model.eval(), _clusters_of(run, under("clusters.", tensors), info)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], origin: object) -> None:
    """Load all weights, no more and no less. Raises MoceError naming those that do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MoceError(f"the weights of {origin} do not fit the model: {reason[:500]}") from None


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass
class Backbone:
    """An encoder that gives tokens, and what it is fed."""

    spec: EncoderSpec
    vit: VisionTransformer

    @property
    def dense(self) -> bool:
        """Whether it is a plain ViT, without token-routed experts."""
        return not any(isinstance(m, TokenExpertFFN) for m in self.vit.modules())

    def build(self, **arguments: Any) -> VisionTransformer:
        """A fresh encoder of the same form, with other timm arguments (a head, drop path)."""
        return copy_experts(self.vit, self.spec.build(**arguments))


def load_backbone(reference: str) -> Backbone:
    """A customized folder, an MAE or TokenMoE run, or the name of a timm model with its own weights.

    Raises MoceError if it is none of these or the weights cannot be had.
    """
    path = expand(Path(reference))
    if (path / BACKBONE_CONFIG).is_file():
        return _exported_backbone(path)
    if path.is_dir():
        if holds_moce(path):
            raise MoceError(f"{path} holds experts: hand out one with 'moce customize' first")
        if read_info(path)["kind"] == "token_moe":
            return _token_moe_backbone(path)
        spec, mae = load_mae(path)
        return Backbone(spec.encoder, mae.encoder)
    if path.exists() or len(path.parts) > 1:
        raise MoceError(f"no backbone at {reference} (give a folder of moce or a timm model name)")
    return _timm_backbone(reference)


def holds_moce(path: Path) -> bool:
    """Whether a path is a finished run of cluster-conditional experts."""
    exported = (path / BACKBONE_CONFIG).is_file()
    return path.is_dir() and not exported and read_info(path)["kind"] == "moce"


def _token_moe_backbone(path: Path) -> Backbone:
    """All experts of it: tokens of one image go to several, so no dense ViT can stand for them."""
    info, tensors = read_model(path, "token_moe")
    with raise_if_corrupt(path / INFO):
        model = TokenMoESpec.from_dict(info["spec"]).build()
        spec = EncoderSpec.from_dict(info["spec"]["mae"]["encoder"])
    load_weights(model, tensors, path)
    return Backbone(spec, model.mae.encoder.eval())


def _exported_backbone(path: Path) -> Backbone:
    try:
        config = json.loads((path / BACKBONE_CONFIG).read_text(encoding="utf-8"))
        cfg = config["pretrained_cfg"]
        arguments = dict(config["model_args"])
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        spec = EncoderSpec(str(config["architecture"]), arguments, mean, std)
    except (ValueError, KeyError, TypeError) as error:
        raise MoceError(f"{path / BACKBONE_CONFIG} is not a timm model config: {error!r}") from None
    if arguments.get("fc_norm"):
        raise MoceError(f"{path} was fine-tuned, with a norm of its own; give what it came from")
    with raise_if_corrupt(path / BACKBONE_CONFIG):
        vit = spec.build(num_classes=0, global_pool="", fc_norm=False)
        _check_encoder(spec, vit)
    tensors = read_tensors(path / "model.safetensors")
    load_weights(vit, {k: v for k, v in tensors.items() if not k.startswith("head.")}, path)
    return Backbone(spec, vit)


def _timm_backbone(name: str) -> Backbone:
    try:
        vit = EncoderSpec(name).build(pretrained=True)
    except MoceError:
        raise
    except Exception as error:  # whatever the hub client raises when there is no network
        reason = str(error).splitlines()[0]
        raise MoceError(f"cannot get the weights of timm model {name}: {reason}") from None
    cfg: Any = vit.pretrained_cfg
    return Backbone(EncoderSpec(name, {}, tuple(cfg["mean"]), tuple(cfg["std"])), vit)
