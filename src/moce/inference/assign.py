"""The clusters of the images that a verb trains on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moce.config import HeadroomSettings, TrainSettings
from moce.data.dataset import ImageDataset
from moce.errors import MoceError, raise_if_corrupt
from moce.inference.features import feature_batches
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import input_size
from moce.runs.assignments import ASSIGNMENTS, read_assignments
from moce.runs.model import CONFIG, read_config
from moce.runtime.progress import log


def assign_images(
    settings: TrainSettings | HeadroomSettings,
    clusters: ClusterModel,
    images: ImageDataset,
    device: torch.device,
    load: Callable[[], ImageDataset],
) -> Tensor:
    """The cluster of every image, [n] int64: as it was clustered, or assigned if it was not there.

    load: loads the same images at the size of the clusters' encoder, for images that are smaller.
    """
    assert settings.clusters is not None
    with raise_if_corrupt(settings.clusters / CONFIG):
        origin = read_config(settings.clusters)["data"]
    if origin != settings.data:
        log(f"the clusters were made from {origin}; images are matched to them by name")
    known = read_assignments(settings.clusters)
    highest = max(known.values(), default=-1)
    if highest >= clusters.num_clusters:
        raise MoceError(
            f"{settings.clusters / ASSIGNMENTS} is damaged or was edited: it names cluster {highest}, "
            f"and there are {clusters.num_clusters} from 0 on"
        )
    cluster_of = torch.tensor([known.get(name, -1) for name in images.ids])
    unseen = (cluster_of < 0).nonzero()[:, 0].tolist()
    if unseen:
        log(f"{len(unseen)} images were not clustered before; assigning them")
        new = _large_enough(clusters, images.subset(unseen), load)
        cluster_of[unseen] = assign(new, clusters, device, settings.precision)
    return cluster_of


def _large_enough(
    clusters: ClusterModel, images: ImageDataset, load: Callable[[], ImageDataset]
) -> ImageDataset:
    height, width = input_size(clusters.encoder)
    if images.shape[2] >= height and images.shape[3] >= width:
        return images
    again = load()
    row_of = {name: row for row, name in enumerate(again.ids)}
    return again.subset([row_of[name] for name in images.ids])


def assign(
    images: ImageDataset, clusters: ClusterModel, device: torch.device, precision: str
) -> Tensor:
    """The cluster of every image, [n] int64, by one forward pass; features are not kept."""
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
