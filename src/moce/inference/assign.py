"""Images to clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moce.data.dataset import ImageDataset
from moce.errors import MoceError, counted, raise_if_corrupt
from moce.inference.features import feature_batches
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import input_size
from moce.runs.assignments import ASSIGNMENTS, read_assignments
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
    load_larger: Callable[[], ImageDataset],
) -> Tensor:
    """The cluster of every image, [n] int64: from the clustering if it had the image, else assigned.

    run: of `moce cluster`. data: where the images are from. load_larger: loads the same images at
    the input size of the clusters' encoder; called if `images` are smaller.
    Raises MoceError if the run's assignments do not fit its clusters.
    """
    known = clustered_images(run, clusters.num_clusters, data)
    cluster_of = torch.tensor([known.get(name, -1) for name in images.ids])
    unseen = (cluster_of < 0).nonzero()[:, 0].tolist()
    if unseen:
        log(f"{counted(len(unseen), 'image')} not in the clustering yet: assigning")
        new = _large_enough(clusters, images.subset(unseen), load_larger)
        cluster_of[unseen] = assign(new, clusters, device, precision)
    return cluster_of


def clustered_images(run: Path, num_clusters: int, data: str) -> dict[str, int]:
    """The cluster of every image of a `moce cluster` run, by id. data: what they are matched to.

    Raises MoceError if the run's assignments do not fit its clusters.
    """
    with raise_if_corrupt(run / CONFIG):
        clustered = read_config(run)["data"]
    if clustered != data:
        log(f"the clusters were made from {clustered}; images are matched to them by name")
    known = read_assignments(run)
    highest = max(known.values(), default=-1)
    if highest >= num_clusters:
        raise MoceError(
            f"{run / ASSIGNMENTS} is corrupt or was edited: it contains cluster {highest}, and there "
            f"are {num_clusters}, counted from 0"
        )
    return known


def _large_enough(
    clusters: ClusterModel, images: ImageDataset, load_larger: Callable[[], ImageDataset]
) -> ImageDataset:
    height, width = input_size(clusters.encoder)
    if images.shape[2] >= height and images.shape[3] >= width:
        return images
    larger = load_larger()
    row_of = {name: row for row, name in enumerate(larger.ids)}
    return larger.subset([row_of[name] for name in images.ids])


def assign(
    images: ImageDataset, clusters: ClusterModel, device: torch.device, precision: str
) -> Tensor:
    """The cluster of every image, [n] int64, by one forward pass; features are not stored."""
    batches = feature_batches(
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
