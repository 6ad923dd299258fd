"""moce train: cluster-conditional experts from an MAE (stage 2), or the MAE for as long (MAE+)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moce.clustering.model import ClusterModel, group_clusters
from moce.config import TrainSettings
from moce.data.images import ImageSet, load_images
from moce.data.keyed import Stream, keyed_generator
from moce.errors import MoceError
from moce.features import extract_features, input_size
from moce.loading import load_clusters, load_mae, read_assignments
from moce.models.gates import gate_for, random_gate
from moce.models.mae import MAE, MAESpec
from moce.models.moce import MoCE, MoCESpec, check_blocks, default_blocks
from moce.runs import last_metrics, read_config, write_model, write_skipped
from moce.training.loop import fit
from moce.training.progress import say
from moce.training.stages import mae_stage, moce_stage
from moce.verbs.pretrain import save_mae
from moce.verbs.start import open_run, pixel_store, settle


@dataclass
class TrainResult:
    """run: the folder; loss: mean loss of the last logged steps; routes: distinct routes (0: no experts)."""

    run: Path
    loss: float
    images: int
    routes: int

    def summary(self) -> str:
        routes = f", {self.routes} routes" if self.routes else ""
        return f"trained on {self.images} images, loss {self.loss:.4f}{routes}: {self.run}"


def run(settings: TrainSettings) -> TrainResult:
    if settings.method == "moce" and settings.clusters is None:
        raise MoceError("method moce needs clusters: add --clusters RUN (of moce cluster)")
    settings, device = settle(settings)
    spec, mae = load_mae(settings.mae)
    images = load_images(settings.data, input_size(mae.encoder), pixel_store(settings))
    if settings.method == "mae":
        return _continue_mae(settings, spec, mae, images, device)
    assert settings.clusters is not None
    clusters = load_clusters(settings.clusters)
    moce_spec, moce = upcycle(settings, spec, mae, clusters)
    cluster_of = assign_images(settings, clusters, images, device)
    open_run(settings)
    write_skipped(settings.out, images.skipped, say)
    stage = moce_stage(moce, spec.encoder, images, cluster_of, settings)
    fit(stage, settings, device, settings.precision)
    return _save(settings, moce_spec, moce.cpu(), clusters, len(images))


def _continue_mae(
    settings: TrainSettings, spec: MAESpec, mae: MAE, images: ImageSet, device: torch.device
) -> TrainResult:
    open_run(settings)
    write_skipped(settings.out, images.skipped, say)
    stage = mae_stage("mae_plus", mae, spec.encoder, images, settings)
    fit(stage, settings, device, settings.precision)
    saved = save_mae(settings.out, spec, mae, images)
    return TrainResult(settings.out, saved.loss, len(images), 0)


def assign_images(
    settings: TrainSettings, clusters: ClusterModel, images: ImageSet, device: torch.device
) -> Tensor:
    """The cluster of every image, [n] int64: as it was clustered, or assigned if it was not there."""
    assert settings.clusters is not None
    origin = read_config(settings.clusters)["data"]
    if origin != settings.data:
        say(f"the clusters were made from {origin}; images are matched to them by name")
    known = read_assignments(settings.clusters)
    cluster_of = torch.tensor([known.get(name, -1) for name in images.ids])
    unseen = (cluster_of < 0).nonzero()[:, 0].tolist()
    if unseen:
        say(f"{len(unseen)} images were not clustered before; assigning them")
        raw = extract_features(
            clusters.encoder,
            clusters.spec,
            images.subset(unseen),
            device=device,
            precision=settings.precision,
            pooling=clusters.pooling,
        )
        clusters.encoder.cpu()
        cluster_of[unseen] = clusters.assign(clusters.normalise(raw))[0]
    return cluster_of


def upcycle(
    settings: TrainSettings, spec: MAESpec, mae: MAE, clusters: ClusterModel
) -> tuple[MoCESpec, MoCE]:
    """A mixture whose experts are copies of the FFNs of `mae`, which becomes part of it."""
    depth = len(mae.encoder.blocks)
    if settings.num_experts > clusters.num_clusters:
        raise MoceError(
            f"{settings.num_experts} experts need as many clusters, and there are "
            f"{clusters.num_clusters}"
        )
    moce_spec = MoCESpec(
        mae=spec,
        blocks=check_blocks(settings.moe_blocks or default_blocks(depth), depth),
        num_experts=settings.num_experts,
        num_clusters=clusters.num_clusters,
        cluster_dim=clusters.centroids.shape[1],
        gate_scale=settings.gate_scale,
        shared_gate=settings.shared_gate,
    )
    moce = MoCE(
        mae,
        moce_spec.blocks,
        [initial_gate(settings, clusters.centroids, n) for n in range(moce_spec.num_gates)],
        clusters.centroids,
        clusters.sizes,
        settings.gate_scale,
        settings.balance_scope,
    )
    return moce_spec, moce


def initial_gate(settings: TrainSettings, centroids: Tensor, number: int) -> Tensor:
    """Weights [E, D] of gate 0, 1, ...: every gate groups the clusters in its own way."""
    if settings.gate_init == "random":
        generator = keyed_generator(settings.seed, Stream.GATE, -1 - number)
        width = centroids.shape[1]
        return random_gate(settings.num_experts, width, settings.gate_init_std, generator)
    groups = group_clusters(centroids, settings.num_experts, settings.seed + 1 + number)
    return gate_for(centroids, groups, settings.num_experts, settings.gate_confidence)


def _save(
    settings: TrainSettings, spec: MoCESpec, moce: MoCE, clusters: ClusterModel, count: int
) -> TrainResult:
    last = last_metrics(settings.out)
    routes = moce.routes()
    distinct = len(routes.unique(dim=0))
    info = {
        "spec": spec.to_dict(),
        "clusters": clusters.info(),
        "experts_of_clusters": {
            str(layer): routes[:, n].tolist() for n, layer in enumerate(spec.blocks)
        },
        "metrics": {
            name: last[name] for name in ("loss", "reconstruction", "balance", "imbalance")
        },
        "images": count,
        "routes": distinct,
    }
    tensors = {f"model.{name}": value for name, value in moce.state_dict().items()}
    tensors |= {f"clusters.{name}": value for name, value in clusters.tensors().items()}
    write_model(settings.out, "moce", tensors, info)
    return TrainResult(settings.out, last["loss"], count, distinct)
