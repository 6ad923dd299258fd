"""`Bank`: a trained MoCE run, ready to hand a backbone to any task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.customization.selection import Choice, Route, choose, count_votes, on_route
from moce.data.from_python import as_image_dataset
from moce.inference.features import extract_features
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec, input_shape
from moce.models.moce import MoCE, MoCESpec
from moce.weights.formats.timm import pooled
from moce.weights.from_runs import load_moce


@dataclass
class Bank:
    """model: the mixture; clusters: the cluster model it was trained with; spec: how to build it."""

    spec: MoCESpec
    model: MoCE
    clusters: ClusterModel
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"

    def __repr__(self) -> str:
        model = self.model
        return (
            f"Bank({self.encoder_spec.name}, experts={model.num_experts}, "
            f"blocks={list(model.blocks)}, clusters={len(model.clusters)}, routes={len(self.routes)})"
        )

    @property
    def encoder_spec(self) -> EncoderSpec:
        return self.spec.mae.encoder

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that clusters are found for."""
        return input_shape(self.clusters.encoder)

    @property
    def task_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of images that are enough for clusters and for backbones."""
        channels, *size = self.input_shape
        _, *own = input_shape(self.model.mae.encoder)
        return channels, max(size[0], own[0]), max(size[1], own[1])

    @property
    def routes(self) -> dict[Route, int]:
        """Every route some cluster takes, with the training images on it, most first."""
        return count_votes(self.model.cluster_sizes.long(), self.model.routes())

    def assign(
        self, images: object, rule: str = "balanced", batch_size: int = 256
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cluster [n] int64 of every image and its similarity [n] to the centroid: one forward pass."""
        channels, *size = self.input_shape
        image_set = as_image_dataset(images, (size[0], size[1]), channels)
        raw = extract_features(
            self.clusters.encoder,
            self.clusters.spec,
            image_set,
            device=self.device,
            precision=self.precision,
            pooling=self.clusters.pooling,
            batch_size=batch_size,
        )
        return self.clusters.assign(self.clusters.normalize(raw), rule)

    def select(
        self,
        images: object,
        strategy: str = "auto",
        threshold: float = 0.5,
        assign: str = "balanced",
        batch_size: int = 256,
    ) -> Choice:
        """Choose experts for a task by its images (labels are not needed).

        images: a DATA argument, an ImageSet, a list of paths or PIL images, or uint8
        [n, c, h, w] of exactly the model's size. assign: balanced or nearest, as
        `ClusterModel.assign`. Raises MoceError if there are no images.
        """
        cluster, similarity = self.assign(images, assign, batch_size)
        histogram = cluster.bincount(minlength=self.clusters.num_clusters)
        return self.choose(histogram, similarity.mean().item(), strategy, threshold)

    @torch.no_grad()
    def choose(
        self, histogram: torch.Tensor, similarity: float, strategy: str, threshold: float = 0.5
    ) -> Choice:
        """As `select`, from the images per cluster, [K]."""
        return choose(
            histogram,
            self.model.routes(),
            self.model.gains(),
            self.model.cluster_sizes,
            (similarity, self.clusters.similarity),
            strategy,
            threshold,
            self.model.num_experts,
        )

    def backbone(self, choice: Choice) -> VisionTransformer:
        """The dense encoder of a choice: all tokens after the final norm, [b, prefix + patches, d]."""
        shares, gains = torch.tensor(choice.shares), torch.tensor(choice.gains)
        return self.model.dense_encoder(shares, gains)

    def route_choice(self, route: Route) -> Choice:
        """The choice of one route, whatever the task. Raises MoceError if no cluster takes it."""
        taking = on_route(self.model.routes(), route)
        sizes = self.model.cluster_sizes.long() * taking
        histogram = sizes if sizes.any() else taking.long()  # no training image took it
        return self.choose(histogram, self.clusters.similarity, "route")

    def customize(
        self, images: object, strategy: str = "auto", **options: Any
    ) -> VisionTransformer:
        """A timm VisionTransformer for the task, pooled to one feature per image, ready to fine-tune.

        Its pretrained_cfg says how its images are made: `timm.data.resolve_model_data_config`.
        """
        encoder = self.backbone(self.select(images, strategy, **options))
        return pooled(encoder, self.encoder_spec)


def load(run: str | Path) -> Bank:
    """Load a `moce train` run. Raises MoceError if the folder is none."""
    return Bank(*load_moce(Path(run)))
