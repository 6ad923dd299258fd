"""Centroids, potentials and encoder: image to cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import normalize

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec
from moce.models.uninitialized import Uninitialized

CHUNK_SIZE = 4096  # rows at a time: [4096, K] scores stay in the processor's cache
TENSORS = ("centroids", "potentials", "mean", "sizes")
ENCODER = "encoder."  # prefix of the encoder's tensors


@dataclass
class ClusterModel:
    """The result of a clustering: assigns unseen images to clusters.

    centroids: [K, D] of unit norm. potentials: [K] dual potentials of the balanced assignment.
    mean: [D] of the raw features. sizes: [K] training images per cluster. similarity: mean cosine
    of the training images and their centroids.
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
        """Raw encoder features [n, D], centered on the training mean and scaled to unit norm."""
        return unit(raw, self.mean)

    def assign(self, features: Tensor, rule: str = "balanced") -> tuple[Tensor, Tensor]:
        """Cluster [n] int64, and cosine to its centroid [n], of normalized features [n, D].

        rule: "balanced" gives training images the cluster they were trained with. "nearest" gives
        the closest centroid, for images that are not distributed like the training images.
        """
        if rule == "balanced":
            cluster = assign(features, self.centroids, self.potentials, self.epsilon)
        elif rule == "nearest":
            cluster = assign(features, self.centroids, torch.zeros_like(self.potentials), 1.0)
        else:
            raise MoceError(f"unknown assignment rule '{rule}' (balanced or nearest)")
        return cluster, (features * self.centroids[cluster]).sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        encoder = {ENCODER + name: value for name, value in self.encoder.state_dict().items()}
        return {name: getattr(self, name) for name in TENSORS} | encoder

    def info(self) -> dict[str, object]:
        """The other values to save, as JSON."""
        return {
            "num_clusters": self.num_clusters,
            "epsilon": self.epsilon,
            "pooling": self.pooling,
            "similarity": self.similarity,
            "encoder": self.spec.to_dict(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: dict) -> ClusterModel:
        """The model from `tensors()` and `info()`."""
        spec = EncoderSpec.from_dict(info["encoder"])
        with Uninitialized():
            encoder = spec.build()
        names = [name for name in tensors if name.startswith(ENCODER)]
        encoder.load_state_dict({name.removeprefix(ENCODER): tensors[name] for name in names})
        encoder.eval().requires_grad_(False)
        return cls(
            **{name: tensors[name] for name in TENSORS},
            epsilon=info["epsilon"],
            pooling=info["pooling"],
            similarity=info["similarity"],
            spec=spec,
            encoder=encoder,
        )


def unit(raw: Tensor, mean: Tensor) -> Tensor:
    """Raw features [n, D], centered on `mean` [D] and scaled to unit norm."""
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
    """S / epsilon + v, [n, K]: its softmax over clusters is the assignment Q."""
    return (features @ (centroids / epsilon).T).add_(potentials)
