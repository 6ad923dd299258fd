"""Models back from run folders, and backbones by folder or timm name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce.config import ClusterPooling, expand
from moce.errors import MoceError, raise_if_corrupt
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec
from moce.models.fit import stated_fit
from moce.models.mae import MAE, MAESpec
from moce.models.moce import MoCE, MoCESpec
from moce.models.token_moe import TokenExpertFFN, TokenMoESpec, copy_experts
from moce.models.uninitialized import Uninitialized
from moce.runs.model import CONFIG, INFO, WEIGHTS, read_info, read_model
from moce.runtime.progress import log
from moce.weights.build import ModelOverrides, build_encoder, read_weights
from moce.weights.formats import timm as timm_format
from moce.weights.types import MODEL_CONFIG


def load_mae(run: Path) -> tuple[MAESpec, MAE]:
    """The masked autoencoder of a `moce pretrain` (or MAE+) run. Raises MoceError if it is none."""
    info, tensors = read_model(run, "mae")
    with raise_if_corrupt(run / INFO):
        spec = MAESpec.from_dict(info["spec"])
        mae = spec.build()
        _check_mae(spec, mae)
    load_weights(mae, tensors, run)
    return spec, mae


def load_clusters(run: Path) -> ClusterModel:
    """The cluster model of a `moce cluster` run. Raises MoceError if it is none."""
    info, tensors = read_model(run, "clusters")
    return _clusters_from(run, tensors, info)


def load_moce(run: Path) -> tuple[MoCESpec, MoCE, ClusterModel]:
    """The mixture and the cluster model of a `moce train` run. Raises MoceError if it is none."""
    info, tensors = read_model(run, "moce")
    with raise_if_corrupt(run / INFO):
        spec = MoCESpec.from_dict(info["spec"])
        with Uninitialized():
            model = spec.build()
        _check_mae(spec.mae, model.mae)
    load_weights(model, _without_prefix("model.", tensors), run)
    return spec, model.eval(), _clusters_from(run, _without_prefix("clusters.", tensors), info)


def _clusters_from(run: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> ClusterModel:
    with raise_if_corrupt(run / INFO):
        clusters = ClusterModel.from_tensors(tensors, info["clusters"])
        _check_encoder(clusters.spec, clusters.encoder)
        if clusters.pooling not in get_args(ClusterPooling):
            raise ValueError(f"pooling {clusters.pooling!r}")
        if not (clusters.epsilon > 0 and -1 <= clusters.similarity <= 1):
            raise ValueError(f"epsilon {clusters.epsilon}, similarity {clusters.similarity}")
    return clusters


def _check_mae(spec: MAESpec, mae: MAE) -> None:
    """Raise ValueError for values that would otherwise show only as a wrong loss."""
    _check_encoder(spec.encoder, mae.encoder)
    if not 0 < spec.mask_ratio < 1:
        raise ValueError(f"a mask_ratio of {spec.mask_ratio}")


def _check_encoder(spec: EncoderSpec, vit: VisionTransformer) -> None:
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != vit.in_chans or not all(isinstance(v, int | float) for v in values):
            raise ValueError(f"{name} {list(values)} for {vit.in_chans} channels")
    if min(spec.std) <= 0:
        raise ValueError(f"std {list(spec.std)}")


def load_weights(module: nn.Module, tensors: dict[str, Tensor], origin: object) -> None:
    """Load all weights of a module. Raises MoceError if names or shapes differ."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MoceError(f"the weights of {origin} do not fit the model: {reason[:500]}") from None


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names have the prefix, by names without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass
class Backbone:
    """An encoder that returns tokens, with the spec to build and feed it."""

    spec: EncoderSpec
    vit: VisionTransformer

    @property
    def dense(self) -> bool:
        """Whether it is a plain ViT, without token-routed experts."""
        return not any(isinstance(m, TokenExpertFFN) for m in self.vit.modules())

    def build(self, **arguments: Any) -> VisionTransformer:
        """A fresh encoder of the same architecture, with other timm arguments (a head, drop path)."""
        return copy_experts(self.vit, self.spec.build(**arguments))


def load_backbone(reference: str) -> Backbone:
    """A run of an MAE, of TokenMoE or of fine-tuning, weights of any format, or a timm model by name.

    A fine-tuned one comes without its head, with its norm after pooling (`fc_norm`). Raises
    MoceError if it is none of these or the weights cannot be downloaded.
    """
    path = expand(Path(reference))
    run = moce_run(path)
    if run is not None and not (run / MODEL_CONFIG).is_file():
        return _backbone_of_run(run)
    if path.exists():
        return _backbone_from(path)
    if len(path.parts) > 1:
        raise MoceError(f"no backbone at {reference} (give a folder, a file or a timm model name)")
    return _timm_backbone(reference)


def moce_run(path: Path) -> Path | None:
    """The run folder of moce for a path to it or to its weights; None if it is not a run.

    An adapted backbone is none: it has settings, but a folder of timm holds its weights.
    """
    folder = path.parent if path.name == WEIGHTS else path
    unfinished = (folder / CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file()
    return folder if unfinished or (folder / INFO).is_file() else None


def holds_moce(path: Path) -> bool:
    """Whether a path is a finished run of cluster-conditional experts."""
    run = path.is_dir() and any((path / name).is_file() for name in (INFO, CONFIG))
    return run and not (path / MODEL_CONFIG).is_file() and read_info(path)["kind"] == "moce"


def _backbone_of_run(run: Path) -> Backbone:
    kind = read_info(run)["kind"]
    if kind == "moce":
        raise MoceError(f"{run} holds experts: build one backbone with 'moce customize' first")
    if kind == "classifier":  # a dense one has a config.json
        raise MoceError(
            f"{run} is fine-tuned with token-routed experts; give its original backbone"
        )
    if kind == "token_moe":
        return _token_moe_backbone(run)
    spec, mae = load_mae(run)
    return Backbone(spec.encoder, mae.encoder)


def _backbone_from(path: Path) -> Backbone:
    spec, vit, notes = build_encoder(read_weights(path), ModelOverrides())
    with raise_if_corrupt(path):
        _check_encoder(spec, vit)
    for note in notes:
        log(note)
    return Backbone(spec, vit)


def _token_moe_backbone(path: Path) -> Backbone:
    """All experts: the tokens of one image go to several, so no dense ViT is equivalent."""
    info, tensors = read_model(path, "token_moe")
    with raise_if_corrupt(path / INFO):
        model = TokenMoESpec.from_dict(info["spec"]).build()
        spec = EncoderSpec.from_dict(info["spec"]["mae"]["encoder"])
    load_weights(model, tensors, path)
    return Backbone(spec, model.mae.encoder.eval())


def _timm_backbone(name: str) -> Backbone:
    vit = timm_format.pretrained(name, {})
    cfg: Any = vit.pretrained_cfg
    return Backbone(
        EncoderSpec(name, {}, tuple(cfg["mean"]), tuple(cfg["std"]), stated_fit(cfg)), vit
    )
