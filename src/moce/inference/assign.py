"""Images to clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moce.data.dataset import ImageDataset
from moce.errors import MoceError, counted, raise_if_corrupt
from moce.inference.features import shared_feature_batches
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import input_size
from moce.runs.assignments import ASSIGNMENTS, Assignments, read_assignments
from moce.runs.model import CONFIG, read_config
from moce.runtime.progress import log


def assign_images(
    run: Path,
    clusters: ClusterModel,
    images: ImageDataset,
    *,
    data: str,
    device: torch.device,
    precision: str,
    decode: Callable[[ImageDataset], ImageDataset],
) -> tuple[ImageDataset, Tensor]:
    """The images, and the cluster of each, [n] int64: from the clustering if it had it, else assigned.

    Images that turn out to be unreadable are left out, and listed in `skipped`.

    run: of `moce cluster`. data: where the images are from. decode: the same images at the input
    size of the clusters' encoder; called if they are not decoded yet, or smaller.
    Raises MoceError if the run's assignments do not fit its clusters.
    """
    known = clustered_images(run, clusters.num_clusters, data)
    cluster_of = torch.from_numpy(known.find(images.ids))
    unseen = (cluster_of < 0).nonzero()[:, 0].tolist()
    if unseen:
        log(f"{counted(len(unseen), 'image')} not in the clustering yet: assigning")
        new = images.subset(unseen)
        if not _large_enough(clusters, new):
            new = decode(new)
        found = Assignments.of(
            new.ids, assign(new, clusters, device, precision) if len(new) else None
        )
        cluster_of[unseen] = torch.from_numpy(found.find(images.ids[row] for row in unseen))
        read = (cluster_of >= 0).nonzero()[:, 0]
        images = replace(images.subset(read.tolist()), skipped=images.skipped + new.skipped)
        cluster_of = cluster_of[read]
    return images, cluster_of


def clustered_images(run: Path, num_clusters: int, data: str) -> Assignments:
    """The cluster of every image of a `moce cluster` run. data: what they are matched to.

    Raises MoceError if the run's assignments do not fit its clusters.
    """
    with raise_if_corrupt(run / CONFIG):
        clustered = read_config(run)["data"]
    if clustered != data:
        log(f"the clusters were made from {clustered}; images are matched to them by name")
    known = read_assignments(run)
    highest = int(known.clusters.max(initial=-1))
    if highest >= num_clusters:
        raise MoceError(
            f"{run / ASSIGNMENTS} is corrupt or was edited: it contains cluster {highest}, and there "
            f"are {num_clusters}, counted from 0"
        )
    return known


def _large_enough(clusters: ClusterModel, images: ImageDataset) -> bool:
    if images.stored is None:
        return False
    height, width = input_size(clusters.encoder)
    return images.shape[2] >= height and images.shape[3] >= width


def assign(
    images: ImageDataset, clusters: ClusterModel, device: torch.device, precision: str
) -> Tensor:
    """The cluster of every image, [n] int64, by one forward pass; features are not stored.

    Several processes call this with the same images, and share the work.
    """
    batches = shared_feature_batches(
        clusters.encoder,
        clusters.spec,
        images,
        device=device,
        precision=precision,
        pooling=clusters.pooling,
    )
    found = [clusters.assign(clusters.normalize(raw))[0] for raw in batches]
    clusters.encoder.cpu()
    return torch.cat(found)
