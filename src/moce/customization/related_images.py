"""Images of a pool that are related to a task: those of the task's own clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from moce.data.dataset import ImageDataset
from moce.data.divide import learning_rows
from moce.data.load import chosen_samples
from moce.data.readers.sample import Sample
from moce.data.readers.table import ids_of, select
from moce.data.rng import Stream, keyed_generator
from moce.errors import MoceError, counted
from moce.inference.assign import assign, clustered_images
from moce.models.cluster_model import ClusterModel
from moce.runs.assignments import ASSIGNMENTS, Assignments
from moce.runs.model import read_config
from moce.runtime.distributed import run_on_rank0
from moce.runtime.progress import log
from moce.weights.from_runs import load_clusters

# Loads images at the input size and channels of an encoder.
Load = Callable[[Sequence[Sample], VisionTransformer], ImageDataset]


@dataclass
class RelatedImages:
    """Finds images of a pool that are related to a task; the same pool can serve many tasks.

    pool: a DATA argument. clusters: what assigns images to clusters. known: clusters of pool images,
    as far as a clustering on disk has them; the others are added when they are first needed.
    skipped: (id, reason) of pool images that could not be read.
    """

    pool: str
    clusters: ClusterModel
    known: Assignments
    load: Load
    device: torch.device
    precision: str
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def find(self, task: Sequence[Sample], count: int, seed: int) -> list[Sample]:
        """At most `count` pool images; their ids start with the pool's name.

        Raises MoceError if the pool has no image of the task's clusters.
        """
        of_task, _ = self._assign(task)
        histogram = np.bincount(of_task.clusters, minlength=self.clusters.num_clusters)
        pool = chosen_samples(self.pool, learning_rows)
        clusters = self._clusters_of(pool)
        drawn = [pool[row] for row in draw_related(clusters, histogram.tolist(), count, seed)]
        if not drawn:
            raise MoceError(f"{self.pool} has no images of the task's clusters: leave it out")
        return [replace(sample, id=f"{self.pool}/{sample.id}") for sample in drawn]

    def _clusters_of(self, pool: Sequence[Sample]) -> np.ndarray:
        """The cluster of every image of the pool, [n], -1 if it cannot be read; new ones are assigned."""
        ids = ids_of(pool)
        found, unreadable = self.known.find(ids), {name for name, _ in self.skipped}
        unseen = [row for row in np.flatnonzero(found < 0).tolist() if ids[row] not in unreadable]
        if unseen:
            log(f"{counted(len(unseen), 'image')} of the pool not in the clustering yet: assigning")
            new, skipped = self._assign(select(pool, unseen))
            self.known = self.known.joined(new)
            self.skipped += skipped
            found = self.known.find(ids)
        return found

    def _assign(self, samples: Sequence[Sample]) -> tuple[Assignments, list[tuple[str, str]]]:
        """The cluster of every image that can be read; (id, reason) of the others."""
        images = self.load(samples, self.clusters.encoder)
        clusters = assign(images, self.clusters, self.device, self.precision)
        clusters = run_on_rank0(lambda: clusters)  # the same for all processes
        return Assignments.of(images.ids, clusters), images.skipped


def known_clusters(
    pool: str, clusters: ClusterModel, given: Path | None, mixture: Path | None
) -> Assignments:
    """The clusters of the pool's images, as far as a clustering on disk has them.

    given: a run of `moce cluster`; mixture: the MoCE run that `clusters` are part of, which names
    its clustering. That may have moved, or another may have taken its place: then none is known.
    Raises MoceError if `given` is not the clustering of the mixture.
    """
    run = given
    if run is None:
        origin = read_config(mixture).get("clusters") if mixture is not None else None
        run = Path(origin) if origin else None
        if run is None or not (run / ASSIGNMENTS).is_file():
            return Assignments.of()
    if not torch.equal(load_clusters(run).centroids, clusters.centroids):
        if given is not None:
            raise MoceError(f"{run} is not the clustering that {mixture} was trained with")
        log(f"{run} is no longer the clustering of {mixture}: it is not used")
        return Assignments.of()
    return clustered_images(run, clusters.num_clusters, pool)


def draw_related(
    clusters: np.ndarray, histogram: Sequence[int], count: int, seed: int
) -> list[int]:
    """The rows of at most `count` different pool images, drawn in proportion to the task's histogram.

    clusters: [n] of every pool image; histogram: [K] task images per cluster. A cluster with too
    few images gives all it has.
    """
    total = sum(histogram)
    drawn: list[int] = []
    for cluster, images in enumerate(histogram):
        found = np.flatnonzero(clusters == cluster) if images else np.empty(0, np.int64)
        wanted = min(len(found), round(count * images / total))
        generator = keyed_generator(seed, Stream.ORDER, -2 - cluster)
        order = torch.randperm(len(found), generator=generator)[:wanted]
        drawn += found[order.numpy()].tolist()
    return drawn
