"""Images of a pool that are related to a task: those of the task's own clusters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from moce.data.dataset import ImageDataset
from moce.data.readers.sample import Sample
from moce.data.rng import Stream, keyed_generator
from moce.errors import MoceError
from moce.inference.assign import assign
from moce.models.cluster_model import ClusterModel
from moce.runtime.progress import log


@dataclass
class RelatedImages:
    """Finds images of a pool that are related to a task.

    clusters: what assigns images to clusters. known: cluster of pool images by id, as far as a
    clustering on disk has it. load: loads images at the input size of the clusters' encoder.
    skipped: (id, reason) of pool images that could not be read.
    """

    clusters: ClusterModel
    known: Mapping[str, int]
    load: Callable[[list[Sample]], ImageDataset]
    device: torch.device
    precision: str
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def find(
        self, task: list[Sample], pool: Sequence[Sample], name: str, count: int, seed: int
    ) -> list[Sample]:
        """At most `count` pool images; their ids start with the pool's name.

        Raises MoceError if the pool has no image of the task's clusters.
        """
        of_task, _ = self._assign(task)
        histogram = torch.tensor(list(of_task.values())).bincount(
            minlength=self.clusters.num_clusters
        )
        cluster_of = dict(self.known)
        unseen = [sample for sample in pool if sample.id not in cluster_of]
        if unseen:
            log(f"{len(unseen)} images of the pool are new to the clustering; assigning them")
            found, self.skipped = self._assign(unseen)
            cluster_of |= found
        readable = [sample for sample in pool if sample.id in cluster_of]
        drawn = draw_related(readable, cluster_of, histogram.tolist(), count, seed)
        if not drawn:
            raise MoceError(f"{name} has no images of the task's clusters; leave out --data")
        return [replace(sample, id=f"{name}/{sample.id}") for sample in drawn]

    def _assign(self, samples: list[Sample]) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The cluster of every image that can be read, by id; (id, reason) of the others."""
        images = self.load(samples)
        clusters = assign(images, self.clusters, self.device, self.precision)
        return dict(zip(images.ids, clusters.tolist(), strict=True)), images.skipped


def draw_related(
    pool: Sequence[Sample],
    cluster_of: Mapping[str, int],
    histogram: Sequence[int],
    count: int,
    seed: int,
) -> list[Sample]:
    """At most `count` different pool images, drawn in proportion to the task's histogram.

    cluster_of: cluster of every pool image, by id; histogram: [K] task images per cluster. A
    cluster with too few images gives all it has.
    """
    members: dict[int, list[Sample]] = {}
    for sample in pool:
        members.setdefault(cluster_of[sample.id], []).append(sample)
    total = sum(histogram)
    drawn: list[Sample] = []
    for cluster, images in enumerate(histogram):
        found = members.get(cluster, [])
        wanted = min(len(found), round(count * images / total))
        generator = keyed_generator(seed, Stream.ORDER, -2 - cluster)
        order = torch.randperm(len(found), generator=generator)[:wanted]
        drawn += [found[row] for row in order.tolist()]
    return drawn
