"""`ClusterModel`: what a clustering leaves behind, enough to assign images it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import normalize

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec

CHUNK_SIZE = 4096  # rows at a time: [4096, K] scores stay in the processor's cache


@dataclass
class ClusterModel:
    """Centroids, potentials and the feature encoder of a clustering.

    centroids: [K, D] unit; potentials: [K] of the balanced assignment; mean: [D] of the raw
    features; sizes: [K] training images per cluster; similarity: mean cosine similarity of the
    training images to their own centroid.
    """

    centroids: Tensor
    potentials: Tensor
    mean: Tensor
    sizes: Tensor
    epsilon: float
    pooling: str
    similarity: float
    spec: EncoderSpec
    encoder: VisionTransformer

    @property
    def num_clusters(self) -> int:
        return self.centroids.shape[0]

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw encoder features [n, D] to what is clustered: centered on the data's mean, unit norm."""
        return unit(raw, self.mean)

    def assign(self, features: Tensor, rule: str = "balanced") -> tuple[Tensor, Tensor]:
        """Cluster [n] int64 and cosine similarity to its centroid [n] of normalized features.

        rule "balanced" gives a training image the cluster it was trained with; "nearest" gives the
        closest centroid, for images that are far from spread over the clusters as the data were.
        """
        if rule == "balanced":
            cluster = assign(features, self.centroids, self.potentials, self.epsilon)
        elif rule == "nearest":
            cluster = assign(features, self.centroids, torch.zeros_like(self.potentials), 1.0)
        else:
            raise MoceError(f"unknown assignment rule '{rule}' (balanced or nearest)")
        return cluster, (features * self.centroids[cluster]).sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What a run stores of this model, by name; `from_tensors` is the inverse."""
        named = {name: getattr(self, name) for name in ("centroids", "potentials", "mean", "sizes")}
        encoder = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        return named | encoder

    def info(self) -> dict[str, object]:
        """The rest of what a run stores: readable values."""
        return {
            "num_clusters": self.num_clusters,
            "epsilon": self.epsilon,
            "pooling": self.pooling,
            "similarity": self.similarity,
            "encoder": self.spec.to_dict(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: dict) -> ClusterModel:
        """Rebuild from `tensors()` and `info()`."""
        spec = EncoderSpec.from_dict(info["encoder"])
        encoder = spec.build()
        prefix = "encoder."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        encoder.load_state_dict(weights)
        encoder.eval().requires_grad_(False)
        named = {name: tensors[name] for name in ("centroids", "potentials", "mean", "sizes")}
        return cls(
            **named,
            epsilon=info["epsilon"],
            pooling=info["pooling"],
            similarity=info["similarity"],
            spec=spec,
            encoder=encoder,
        )


def unit(raw: Tensor, mean: Tensor) -> Tensor:
    """Raw encoder features [n, D] to what is clustered: centered on the data's mean [D], unit norm."""
    return normalize(raw.float() - mean, dim=1)


def assign(
    features: Tensor,
    centroids: Tensor,
    potentials: Tensor,
    epsilon: float,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The cluster of every feature, [n] int64: argmax over clusters of Q."""
    chunks = features.split(chunk_size)
    return torch.cat([scores(c, centroids, potentials, epsilon).argmax(dim=1) for c in chunks])


def scores(features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float) -> Tensor:
    """S / epsilon + v, [n, K]: its softmax is the assignment, its argmax the image's cluster."""
    return (features @ (centroids / epsilon).T).add_(potentials)
