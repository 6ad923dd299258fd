"""moce cluster: balanced clusters of the images by an MAE's features (stage 1)."""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moce.clustering.balanced_kmeans import (
    SAMPLE,
    Callbacks,
    Clustering,
    Iteration,
    balanced_kmeans,
    check_enough,
)
from moce.clustering.checkpoint import load_iteration, metrics_row, save_iteration
from moce.clustering.feature_store import FeatureFile
from moce.clustering.features import gather_shards
from moce.commands.setup import read_images, resolve, start_run
from moce.config import ClusterSettings
from moce.data.dataset import ImageDataset
from moce.errors import Interrupted, counted
from moce.inference.features import feature_batches, feature_width
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec
from moce.runs.assignments import write_assignments
from moce.runs.model import INFO, STATE, read_model, write_model
from moce.runtime.device import fits_on
from moce.runtime.distributed import agreed_signal, barrier, shard_range, world_size
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log, meter
from moce.runtime.signals import StopRequest, stop_request
from moce.training.metrics import MetricLog
from moce.weights.resolve import start_from

FEW = 10  # images per cluster that a clustering should have


@dataclass
class ClusterResult:
    """run: the folder. sizes: images per cluster. similarity: mean cosine to the own centroid."""

    run: Path
    sizes: list[int]
    similarity: float
    iterations: int

    def summary(self) -> str:
        return (
            f"{counted(len(self.sizes), 'cluster')} of {min(self.sizes):,} to "
            f"{counted(max(self.sizes), 'image')} after {counted(self.iterations, 'iteration')}: {self.run}"
        )


def run(settings: ClusterSettings) -> ClusterResult:
    settings, device = resolve(settings)
    if settings.resume and (settings.out / INFO).is_file():
        return _finished(settings.out)
    spec, mae = start_from(settings.mae, settings)
    images = read_images(settings, settings.data, mae.encoder)
    _check_enough(images, settings.num_clusters)
    start_run(settings, images)
    with stop_request("this batch of features or iteration") as stop:
        job = _Job(settings, device, spec.encoder, mae.encoder, images, stop)
        features, mean = job.features()
        found = job.clusters(features)
    del features  # their file cannot be removed while it is mapped
    return job.save(found, mean)


def _check_enough(images: ImageDataset, num_clusters: int) -> None:
    """Raise MoceError, before anything is written, if there are fewer distinct images than clusters."""
    check_enough(_count_distinct(images, num_clusters), num_clusters)
    if len(images) < FEW * num_clusters:
        log(f"{len(images)} images are few for {num_clusters} clusters; consider fewer clusters")


def _count_distinct(images: ImageDataset, enough: int) -> int:
    """The number of images with different pixels; stops counting at `enough`."""
    seen: set[bytes] = set()
    for row in range(len(images)):
        seen.add(hashlib.sha256(images.take(slice(row, row + 1)).numpy().data).digest())
        if len(seen) == enough:
            break
    return len(seen)


def _finished(folder: Path) -> ClusterResult:
    """The result of a run that is already finished."""
    if is_rank0():  # a kill may have left it
        shutil.rmtree(folder / STATE, ignore_errors=True)
    info, tensors = read_model(folder, "clusters")
    sizes, similarity = tensors["sizes"].tolist(), info["clusters"]["similarity"]
    metrics = info["metrics"]
    iterations = metrics["iterations"] if "iterations" in metrics else metrics["rounds"]  # 0.1.0
    return ClusterResult(folder, sizes, similarity, iterations)


@dataclass
class _Job:
    """A running clustering. Each of several processes has its shard of the images."""

    settings: ClusterSettings
    device: torch.device
    spec: EncoderSpec
    encoder: VisionTransformer
    images: ImageDataset
    stop: StopRequest
    iterations: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def shard(self) -> slice:
        return shard_range(len(self.images))

    def features(self) -> tuple[Tensor, Tensor]:
        """Unit features of this process's images, [n, width] in a file, and the mean of all."""
        settings, shard = self.settings, self.shard
        count = shard.stop - shard.start
        file = FeatureFile(settings.out, count, feature_width(self.encoder, settings.pooling))
        if file.done:
            log(f"resuming {settings.out}: {file.done} of {count} features are extracted")
        if file.done < count:
            batches = feature_batches(
                self.encoder,
                self.spec,
                self.images,
                device=self.device,
                precision=settings.precision,
                pooling=settings.pooling,
                batch_size=settings.batch_size,
                rows=slice(shard.start + file.done, shard.stop),
            )
            with closing(batches):
                file.fill(batches, lambda: self.stop.received is not None)
        self._raise_if_stopped(f"{file.done} of {count} features")
        mean = file.center()
        return file.tensor(), mean

    def clusters(self, features: Tensor) -> Clustering:
        """Balanced k-means, resumed from the last saved iteration."""
        settings, count = self.settings, len(self.images)
        start = load_iteration(settings.out, count, self.device) if settings.resume else None
        if start is not None:
            self.iterations = start.step
            log(f"resuming {settings.out} after iteration {start.step}")
        metric_log = MetricLog(settings.out, (), self.iterations)
        stages = 2 if count > SAMPLE * settings.num_clusters else 1
        with meter("cluster", stages * settings.max_iterations, self.iterations) as progress:

            def on_iteration(state: Iteration) -> None:
                self._save_iteration(state, metric_log)
                progress.advance(f"{state.moved:.1%} of the images moved")
                self._raise_if_stopped(f"iteration {state.step}")

            return balanced_kmeans(
                self._cached_on_gpu(features),
                settings.num_clusters,
                epsilon=settings.epsilon,
                update=settings.update,
                tolerance=settings.marginal_tolerance,
                max_iterations=settings.max_iterations,
                chunk_size=settings.chunk_size,
                seed=settings.seed,
                sharded=True,
                device=self.device,
                start=start,
                callbacks=Callbacks(on_iteration, self._on_pass),
            )

    def _cached_on_gpu(self, features: Tensor) -> Tensor:
        """The features on a GPU with room for them; otherwise they are sent chunk by chunk."""
        fits = self.settings.cache_on_gpu and fits_on(self.device, features.nbytes)
        return features.to(self.device) if fits else features

    def _save_iteration(self, state: Iteration, metric_log: MetricLog) -> None:
        """Write metrics, then the state: on resume, rows after the saved iteration are removed."""
        now = time.monotonic()
        seconds, self.since, self.iterations = now - self.since, now, state.step
        metric_log.write(metrics_row(state), {"step": state.step, "step_s": round(seconds, 5)})
        save_iteration(self.settings.out, state, len(self.images))

    def _on_pass(self) -> None:
        """One process can stop after any pass; several only after an iteration, together."""
        if world_size() == 1:
            self._raise_if_stopped(f"iteration {self.iterations}")

    def _raise_if_stopped(self, done: str) -> None:
        """Raise Interrupted if any process was asked to stop."""
        received = agreed_signal(self.stop.received)
        if received is not None:
            raise Interrupted(received, self.settings.out, done)

    def save(self, found: Clustering, mean: Tensor) -> ClusterResult:
        """Write the finished run and remove its state."""
        settings, count = self.settings, len(self.images)
        if found.marginal_error > settings.marginal_tolerance:
            log(
                f"clusters are balanced to {found.marginal_error:.1%}, not to the "
                f"{settings.marginal_tolerance:.1%} of --marginal-tolerance; a larger --epsilon may "
                "help"
            )
        model = ClusterModel(
            centroids=found.centroids.cpu(),
            potentials=found.potentials.cpu(),
            mean=mean,
            sizes=found.sizes.cpu(),
            epsilon=settings.epsilon,
            pooling=settings.pooling,
            similarity=found.similarity,
            spec=self.spec,
            encoder=self.encoder.cpu(),
        )
        sizes = found.sizes.tolist()
        assignment = gather_shards(found.assignment.cpu(), count, self.shard)
        barrier()
        if is_rank0():
            write_assignments(settings.out, self.images.ids, assignment)
            metrics = {
                "iterations": found.iterations,
                "smallest": min(sizes),
                "largest": max(sizes),
                "marginal_error": found.marginal_error,
            }
            info = {"clusters": model.info(), "metrics": metrics, "images": count}
            write_model(settings.out, "clusters", model.tensors(), info)
            shutil.rmtree(settings.out / STATE, ignore_errors=True)
        barrier()
        return ClusterResult(settings.out, sizes, found.similarity, found.iterations)
