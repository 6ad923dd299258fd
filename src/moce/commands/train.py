"""moce train: cluster-conditional experts from an MAE (stage 2), or a baseline for as long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce.commands.monitoring import set_monitor
from moce.commands.pretrain import save_mae
from moce.commands.setup import (
    changed,
    check_skipped,
    choose,
    decoded,
    pixel_file,
    resolve,
    start_run,
    training_images,
)
from moce.config import TrainSettings
from moce.customization.bank import Bank
from moce.data.dataset import ImageDataset
from moce.data.divide import voting_rows
from moce.data.load import chosen_samples, load_images
from moce.errors import MoceError, counted
from moce.evaluation.monitor import Dense, Mixture
from moce.inference.assign import assign, assign_images
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import fit_of, input_channels
from moce.models.mae import MAE, MAESpec
from moce.models.moce import MoCE, MoCESpec
from moce.runs.model import last_metrics, write_model
from moce.runtime.progress import log
from moce.training.announce import announce
from moce.training.defaults import default_lr
from moce.training.objectives import MAEObjective, MoCEObjective, TokenMoEObjective
from moce.training.trainer import Objective, fit, total_steps
from moce.training.upcycling import check_experts, upcycle, upcycle_by_token
from moce.weights.from_runs import load_clusters
from moce.weights.resolve import start_from


@dataclass
class TrainResult:
    """run: the folder; loss: mean loss of the last logged steps; routes: distinct routes (0: no experts)."""

    run: Path
    loss: float
    images: int
    routes: int

    def summary(self) -> str:
        routes = f", {counted(self.routes, 'route')}" if self.routes else ""
        return (
            f"trained on {counted(self.images, 'image')}, loss {self.loss:.4f}{routes}: {self.run}"
        )


def run(settings: TrainSettings) -> TrainResult:
    asked, device = resolve(settings)
    spec, mae = start_from(asked.mae, asked)
    images = training_images(asked, asked.data, mae.encoder)
    settings = choose(asked, len(images), mae.encoder, device, default_lr(asked.mae))
    job = _Job(settings, device, spec, mae, images, changed(asked, settings))
    return METHODS[settings.method](job)


@dataclass
class _Job:
    settings: TrainSettings
    device: torch.device
    spec: MAESpec
    mae: MAE
    images: ImageDataset
    chosen: list[str]

    def clusters(self) -> ClusterModel:
        assert self.settings.clusters is not None
        return load_clusters(self.settings.clusters)

    def clusters_of_images(self, clusters: ClusterModel) -> Tensor:
        """The cluster of every training image, [n] int64; leaves out what cannot be read."""
        settings = self.settings
        assert settings.clusters is not None
        self.images, cluster_of = assign_images(
            settings.clusters,
            clusters,
            self.images,
            data=settings.data,
            device=self.device,
            precision=settings.precision,
            decode=lambda images: decoded(settings, settings.data, images, clusters.encoder),
        )
        check_skipped(self.images, settings.max_skipped)
        return cluster_of

    def fit(self, objective: Objective, network: Dense | Mixture) -> None:
        """Train the objective's model and move it back to the CPU. network: what is measured of it."""
        set_monitor(objective, self.settings, self.images, network, self.device)
        start_run(self.settings, self.images)
        name, encoder = self.spec.encoder.name, self.mae.encoder
        announce(objective, self.settings, self.device, name, encoder, self.chosen)
        fit(objective, self.settings, self.device, self.settings.precision)
        objective.model.cpu()


def _train_experts(job: _Job) -> TrainResult:
    """MoCE, and SDR: the same with gates that stay as they start."""
    clusters = job.clusters()
    check_experts(job.settings, clusters)
    cluster_of = job.clusters_of_images(clusters)
    sizes = cluster_of.bincount(minlength=clusters.num_clusters)
    spec, moce = upcycle(job.settings, job.spec, job.mae, clusters, sizes)
    bank = Bank(spec, moce, clusters, job.device, job.settings.precision)
    objective = MoCEObjective(moce, job.spec.encoder, job.images, cluster_of, job.settings)
    job.fit(objective, Mixture(bank))
    return _save_experts(job, spec, moce, clusters)


def _continue_mae(job: _Job) -> TrainResult:
    """MAE+: the MAE trained on, without experts."""
    objective = MAEObjective("mae_plus", job.mae, job.spec.encoder, job.images, job.settings)
    job.fit(objective, Dense(job.mae, job.mae.encoder, job.spec.encoder, job.mae))
    saved = save_mae(job.settings.out, job.spec, job.mae, job.images)
    return TrainResult(job.settings.out, saved.loss, len(job.images), 0)


def _continue_on_subset(job: _Job) -> TrainResult:
    """MAE+ on the images of the task's clusters only: what MoCE's experts are to come near to."""
    assert job.settings.task is not None
    clusters = job.clusters()
    cluster_of = job.clusters_of_images(clusters)
    samples = chosen_samples(job.settings.task, voting_rows)
    encoder = clusters.encoder
    store = pixel_file(job.settings)
    task = load_images(samples, fit_of(encoder), store, channels=input_channels(encoder))
    histogram = assign(task, clusters, job.device, job.settings.precision).bincount(
        minlength=clusters.num_clusters
    )
    sizes = cluster_of.bincount(minlength=clusters.num_clusters)
    chosen = clusters_of_task(histogram, sizes, job.settings.task_share)
    rows = chosen[cluster_of].nonzero()[:, 0].tolist()
    if not rows:
        raise MoceError(f"none of the images is of a cluster of {job.settings.task}")
    log(
        f"{len(rows)} of {len(job.images)} images are of the task's {counted(int(chosen.sum()), 'cluster')}"
    )
    # As many steps as MAE+ makes on all images, not as few as an epoch of these takes.
    steps = total_steps(job.settings, len(job.images))
    job.settings = job.settings.model_copy(update={"steps": steps})
    job.images = job.images.subset(rows)
    return _continue_mae(job)


def clusters_of_task(histogram: Tensor, sizes: Tensor, share: float) -> Tensor:
    """The clusters in which a task is densest, [K] bool, as many as hold `share` of its images.

    histogram: [K] the task's images per cluster; sizes: [K] the training images per cluster.
    """
    order = (histogram.double() / sizes.clamp(min=1)).argsort(descending=True)
    before = histogram[order].cumsum(0) - histogram[order]
    chosen = torch.zeros(len(histogram), dtype=torch.bool)
    chosen[order] = (before < share * histogram.sum()) & (histogram[order] > 0)
    return chosen


def _train_by_token(job: _Job) -> TrainResult:
    """TokenMoE: experts whose gate reads tokens."""
    spec, model = upcycle_by_token(job.settings, job.spec, job.mae)
    objective = TokenMoEObjective(model, job.spec.encoder, job.images, job.settings)
    job.fit(objective, Dense(model, model.mae.encoder, job.spec.encoder, model.mae))
    metrics = _metrics(job, ("loss", "reconstruction", "balance"))
    info = {"spec": spec.to_dict(), "metrics": metrics, "images": len(job.images)}
    write_model(job.settings.out, "token_moe", model.state_dict(), info)
    return TrainResult(job.settings.out, metrics["loss"], len(job.images), 0)


METHODS: dict[str, Callable[[_Job], TrainResult]] = {
    "moce": _train_experts,
    "sdr": _train_experts,
    "mae": _continue_mae,
    "subset": _continue_on_subset,
    "token_moe": _train_by_token,
}


def _metrics(job: _Job, names: tuple[str, ...]) -> dict[str, Any]:
    last = last_metrics(job.settings.out)
    return {name: last[name] for name in names}


def _save_experts(job: _Job, spec: MoCESpec, moce: MoCE, clusters: ClusterModel) -> TrainResult:
    routes = moce.routes()
    distinct = len(routes.unique(dim=0))
    metrics = _metrics(job, ("loss", "reconstruction", "balance", "imbalance"))
    info = {
        "spec": spec.to_dict(),
        "clusters": clusters.info(),
        "experts_of_clusters": {
            str(layer): routes[:, n].tolist() for n, layer in enumerate(spec.blocks)
        },
        "metrics": metrics,
        "images": len(job.images),
        "routes": distinct,
    }
    tensors = {f"model.{name}": value for name, value in moce.state_dict().items()}
    tensors |= {f"clusters.{name}": value for name, value in clusters.tensors().items()}
    write_model(job.settings.out, "moce", tensors, info)
    return TrainResult(job.settings.out, metrics["loss"], len(job.images), distinct)
