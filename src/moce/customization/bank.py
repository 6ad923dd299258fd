"""`Bank`: a trained MoCE that selects a route for a task and builds its ViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import AdaptationSettings
from moce.config.load import parse
from moce.customization.adapter import adapt_samples, load_for
from moce.customization.related_images import RelatedImages, known_clusters
from moce.customization.selection import Choice, Route, choose, count_votes, on_route
from moce.data.divide import voting_rows
from moce.data.from_python import as_image_dataset, as_samples
from moce.data.load import Choose, chosen_samples
from moce.data.readers.sample import Sample
from moce.inference.features import extract_features
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec, fit_of, input_channels, input_shape
from moce.models.mae import MAE
from moce.models.moce import MoCE, MoCESpec
from moce.models.uninitialized import Uninitialized
from moce.training.defaults import BASE_LR, default_lr
from moce.weights.formats.timm import pooled
from moce.weights.from_runs import load_moce


@dataclass
class Bank:
    """A trained mixture of experts.

    spec: how to build the model; model: the mixture; clusters: the cluster model that it was
    trained with; device, precision ("float32" or "bf16"): where and how cluster features are
    computed; run: the folder it was loaded from.
    """

    spec: MoCESpec
    model: MoCE
    clusters: ClusterModel
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"
    run: Path | None = None

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
        """Channels, height and width of the images that `assign` takes."""
        return input_shape(self.clusters.encoder)

    @property
    def task_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of images that are large enough for clusters and backbones."""
        channels, height, width = self.input_shape
        _, backbone_height, backbone_width = input_shape(self.model.mae.encoder)
        return channels, max(height, backbone_height), max(width, backbone_width)

    @property
    def routes(self) -> dict[Route, int]:
        """Every route that a cluster takes, with its number of training images, most first."""
        return count_votes(self.model.cluster_sizes.long(), self.model.routes())

    def assign(
        self,
        images: object,
        rule: str = "balanced",
        batch_size: int = 256,
        choose: Choose | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cluster of every image, [n] int64, and its cosine similarity to the centroid, [n].

        images, rule: see `select`. choose: which images of DATA (default: all). Several processes
        share the work. Raises MoceError if there are no images.
        """
        encoder = self.clusters.encoder
        features = extract_features(
            encoder,
            self.clusters.spec,
            as_image_dataset(images, fit_of(encoder), input_channels(encoder), choose),
            device=self.device,
            precision=self.precision,
            pooling=self.clusters.pooling,
            batch_size=batch_size,
            shared=True,
        )
        return self.clusters.assign(self.clusters.normalize(features), rule)

    def select(
        self,
        images: object,
        strategy: str = "auto",
        threshold: float = 0.9,
        assign: str = "balanced",
        batch_size: int = 256,
    ) -> Choice:
        """Choose experts for a task by its images; labels are not needed.

        The test images of a DATA argument have no vote (see `moce.data.divide`).

        images: a DATA argument, an ImageDataset, a list of paths or PIL images, or uint8
        [n, c, h, w] of exactly the model's size. strategy, threshold: see `choose` in
        `moce.customization.selection`. assign: "balanced" or "nearest", see `ClusterModel.assign`.
        Raises MoceError if there are no images.
        """
        cluster, similarity = self.assign(images, assign, batch_size, voting_rows)
        histogram = cluster.bincount(minlength=self.clusters.num_clusters)
        return self.choose(histogram, similarity.mean().item(), strategy, threshold)

    @torch.no_grad()
    def choose(
        self, histogram: torch.Tensor, similarity: float, strategy: str, threshold: float = 0.9
    ) -> Choice:
        """Like `select`, given the images per cluster, [K], and their mean similarity."""
        return choose(
            histogram,
            self.model.routes().cpu(),  # the model may be on a GPU, where it trains
            self.model.gains().cpu(),
            self.model.cluster_sizes.cpu(),
            (similarity, self.clusters.similarity),
            strategy,
            threshold,
            self.model.num_experts,
        )

    def route_choice(self, route: Route) -> Choice:
        """The choice of one route for any task. Raises MoceError if no cluster takes it."""
        taking = on_route(self.model.routes(), route)
        sizes = self.model.cluster_sizes.long() * taking
        histogram = sizes if sizes.any() else taking.long()  # a route without training images
        return self.choose(histogram, self.clusters.similarity, "route")

    def backbone(self, choice: Choice) -> VisionTransformer:
        """The dense ViT of a choice; it returns normed tokens, [b, prefix + patches, d]."""
        shares, gains = torch.tensor(choice.shares), torch.tensor(choice.gains)
        return self.model.dense_encoder(shares, gains)

    def mae(self, choice: Choice) -> MAE:
        """The masked autoencoder of a choice: its dense ViT with the mixture's decoder."""
        mae = self.model.mae
        decoder = {n: v for n, v in mae.state_dict().items() if not n.startswith("encoder.")}
        encoder = {f"encoder.{n}": v for n, v in self.backbone(choice).state_dict().items()}
        with Uninitialized():
            dense = self.spec.mae.build()
        dense.load_state_dict(decoder | encoder)
        return dense

    def customize(
        self,
        images: object,
        strategy: str = "auto",
        threshold: float = 0.9,
        assign: str = "balanced",
        batch_size: int = 256,
        num_classes: int = 0,
        adapt_steps: int | Literal["auto"] = 0,
        data: str | Path | None = None,
        pool_share: float = 0.5,
        adapt_batch_size: int = 128,
        adapt_lr: float | None = None,
        seed: int = 0,
    ) -> VisionTransformer:
        """A timm ViT for the task that returns one feature per image, [b, d], ready to fine-tune.

        num_classes: of a new head, which then returns logits, [b, num_classes]. adapt_steps: continue
        masked autoencoding on the images for so many steps, or "auto"; data: a pool, a DATA argument,
        from which images of the task's clusters are drawn, too; pool_share, adapt_batch_size,
        adapt_lr: as in `moce customize`; seed: of the adaptation. The others are as for `select`.
        `timm.data.resolve_model_data_config` gives its preprocessing. Raises MoceError if there are
        no images, or a setting is not valid.
        """
        if not adapt_steps:
            encoder = self.backbone(self.select(images, strategy, threshold, assign, batch_size))
            return pooled(encoder, self.encoder_spec, num_classes=num_classes)
        given = {
            "run": self.run or Path(),
            "images": "images given in Python",
            "data": None if data is None else str(data),
            "pool_share": 0.0 if data is None else pool_share,
            "steps": None if adapt_steps == "auto" else adapt_steps,
            "batch_size": adapt_batch_size,
            "base_lr": adapt_lr or (BASE_LR if self.run is None else default_lr(self.run)),
            "seed": seed,
            "device": self.device.type,
            "precision": self.precision,
            "out": Path(),  # a temporary folder takes its place
        }
        settings = parse(AdaptationSettings, given)
        task: Sequence[Sample]
        if isinstance(images, str | Path):
            task = chosen_samples(str(images), voting_rows)
        else:
            channels, height, width = self.task_shape
            images = as_image_dataset(images, (height, width), channels, voting_rows)
            task = as_samples(images)
        mae = self.mae(self.select(images, strategy, threshold, assign, batch_size))
        adapt_samples(task, self.spec.mae, mae, self._related(data), settings, self.device)
        return pooled(mae.encoder.cpu(), self.encoder_spec, num_classes=num_classes)

    def _related(self, data: str | Path | None) -> RelatedImages | None:
        if data is None:
            return None
        known = known_clusters(str(data), self.clusters, None, self.run)
        return RelatedImages(str(data), self.clusters, known, load_for, self.device, self.precision)


def load(run: str | Path) -> Bank:
    """Load a `moce train` run. Raises MoceError if the folder is not one."""
    return Bank(*load_moce(Path(run)), run=Path(run))
