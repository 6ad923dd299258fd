"""moce cluster: balanced clusters of the images by an MAE's features (stage 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moce.clustering.balanced import Clustering, Round, Watch, balanced_kmeans, check_count
from moce.clustering.model import ClusterModel
from moce.clustering.progress import as_row, load_round, save_round
from moce.config import ClusterSettings
from moce.data.batches import RESIDENT_SHARE
from moce.data.images import ImageSet
from moce.errors import Interrupted
from moce.feature_file import FeatureFile, clear
from moce.features import feature_batches, feature_width
from moce.loading import write_assignments
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAESpec
from moce.processes import all_sum, is_main, own_share, wait_for_all, world
from moce.runs import INFO, read_model, write_config, write_model, write_skipped
from moce.training.checkpoint import checksum
from moce.training.interrupt import StopRequest, stop_request
from moce.training.log import MetricLog
from moce.training.progress import Meter, meter, say
from moce.verbs.start import open_run, read_images, settle
from moce.verbs.weights import start_from

FEW = 10  # images per cluster, below which clusters say little


@dataclass
class ClusterResult:
    """run: the folder; sizes: images per cluster; similarity: mean cosine of images and centroids."""

    run: Path
    sizes: list[int]
    similarity: float
    rounds: int

    def summary(self) -> str:
        return (
            f"{len(self.sizes)} clusters of {min(self.sizes)} to {max(self.sizes)} images "
            f"after {self.rounds} rounds: {self.run}"
        )


def run(settings: ClusterSettings) -> ClusterResult:
    settings, device = settle(settings)
    if settings.resume and (settings.out / INFO).is_file():
        return _finished(settings.out)
    spec, mae = start_from(settings.mae, settings)
    images = read_images(settings, settings.data, mae.encoder)
    _check(settings, len(images))
    open_run(settings)
    write_config(settings.out, settings)
    write_skipped(settings.out, images.skipped, say)
    with stop_request() as stop:
        job = _Job(settings, device, spec.encoder, mae.encoder, images, stop)
        features, mean = job.features()
        found = job.clusters(features)
    return job.save(found, mean)
