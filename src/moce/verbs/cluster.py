"""moce cluster: balanced clusters of the images by an MAE's features (stage 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.clustering.balanced import balanced_kmeans, check_count
from moce.clustering.model import ClusterModel, unit_features
from moce.config import ClusterSettings
from moce.features import extract_features
from moce.loading import write_assignments
from moce.runs import write_config, write_model, write_skipped
from moce.training.progress import meter, say
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
    spec, mae = start_from(settings.mae, settings)
    images = read_images(settings, settings.data, mae.encoder)
    check_count(len(images), settings.num_clusters)
    if len(images) < FEW * settings.num_clusters:
        say(
            f"{len(images)} images are few for {settings.num_clusters} clusters; fewer may serve better"
        )
    raw = extract_features(
        mae.encoder,
        spec.encoder,
        images,
        device=device,
        precision=settings.precision,
        pooling=settings.pooling,
        batch_size=settings.batch_size,
    )
    features, mean = unit_features(raw)
    with meter("cluster", settings.max_rounds) as progress:
        found = balanced_kmeans(
            features.to(device),
            settings.num_clusters,
            epsilon=settings.epsilon,
            update=settings.update,
            tolerance=settings.marginal_tolerance,
            max_rounds=settings.max_rounds,
            chunk_size=settings.chunk_size,
            seed=settings.seed,
            on_round=lambda number, moved: progress.advance(f"{moved:.1%} of the images moved"),
        )
    centroids = found.centroids.cpu()
    similarity = (features * centroids[found.assignment.cpu()]).sum(dim=1).mean().item()
    model = ClusterModel(
        centroids=centroids,
        potentials=found.potentials.cpu(),
        mean=mean,
        sizes=found.sizes.cpu(),
        epsilon=settings.epsilon,
        pooling=settings.pooling,
        similarity=similarity,
        spec=spec.encoder,
        encoder=mae.encoder.cpu(),
    )
    open_run(settings)
    write_config(settings.out, settings)
    write_skipped(settings.out, images.skipped, say)
    write_assignments(settings.out, images.ids, found.assignment)
    sizes = found.sizes.tolist()
    metrics = {"rounds": found.rounds, "smallest": min(sizes), "largest": max(sizes)}
    info = {"clusters": model.info(), "metrics": metrics, "images": len(images)}
    write_model(settings.out, "clusters", model.tensors(), info)
    return ClusterResult(settings.out, sizes, similarity, found.rounds)
