"""Cluster features of all images of a map, computed in chunks and kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moce.data.dataset import ImageDataset
from moce.data.load import check_reasons, try_decode
from moce.data.readers.sample import Sample
from moce.data.readers.table import ids_of, labels_and_splits
from moce.errors import MoceError
from moce.inference.features import feature_batches, feature_width
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import fit_of, input_channels
from moce.runs.files import checksum, read_tensor_metadata, read_tensors, write_tensors
from moce.runs.model import read_skipped, write_skipped
from moce.runs.resume import describe_images
from moce.runtime.progress import log

FEATURES = "features.safetensors"
INPUTS = "inputs"  # in the metadata: what the file was made from
Told = Callable[[int, int], None]  # is called with how many of how many images are done


@dataclass
class Embedded:
    """m images in the space of the clusters.

    rows: [m] int64, their places among the images of DATA; features: [m, D] float16 of unit norm;
    cluster: [m] int64; similarity: [m] float32, to the centroid.
    """

    rows: Tensor
    features: Tensor
    cluster: Tensor
    similarity: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Embedder:
    """Computes cluster features of images. batch_size: images that are read and computed at a time."""

    clusters: ClusterModel
    device: torch.device
    precision: str = "float32"
    batch_size: int = 128

    def embed(self, samples: Sequence[Sample]) -> tuple[Embedded, dict[int, str]]:
        """A few images at once, and by row why the others cannot be read."""
        encoder = self.clusters.encoder
        fit = fit_of(encoder)
        pixels, reasons = try_decode(samples, input_channels(encoder), fit)
        rows = [row for row in range(len(samples)) if row not in reasons]
        nothing = [None] * len(rows)
        images = ImageDataset(pixels[rows], list(map(str, rows)), nothing, nothing, fit=fit)
        batches = feature_batches(
            encoder,
            self.clusters.spec,
            images,
            device=self.device,
            precision=self.precision,
            pooling=self.clusters.pooling,
            batch_size=self.batch_size,
            quiet=True,
        )
        width = feature_width(encoder, self.clusters.pooling)
        features = self.clusters.normalize(torch.cat([torch.empty(0, width), *batches]))
        if not features.isfinite().all():
            raise MoceError("some image features are not finite; is the run corrupt?")
        found = [torch.tensor(rows, dtype=torch.int64), features.half(), *self._assign(features)]
        return Embedded(*found), reasons

    def _assign(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if not len(features):
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return self.clusters.assign(features)

    def describe(self, samples: Sequence[Sample]) -> str:
        """What features of these images depend on: names and labels, and the cluster model."""
        labels = labels_and_splits(samples)[0]
        images = describe_images(zip(ids_of(samples), labels, strict=True))
        return f"{images}, clusters {checksum(self.clusters.tensors())}"

    def embed_all(
        self, samples: Sequence[Sample], name: str, max_skipped: float, told: Told
    ) -> tuple[Embedded, list[tuple[str, str]]]:
        """All images of DATA in chunks, and (id, reason) of those that cannot be read.

        name: of DATA, for messages. Raises MoceError if no image is readable, or more than the share
        `max_skipped` is not.
        """
        found: list[Embedded] = []
        reasons: dict[int, str] = {}
        told(0, len(samples))
        for start in range(0, len(samples), self.batch_size):
            chunk = samples[start : start + self.batch_size]
            part, unreadable = self.embed(chunk)
            part.rows += start
            found.append(part)
            reasons |= {start + row: reason for row, reason in unreadable.items()}
            told(start + len(chunk), len(samples))
        check_reasons(samples, reasons, max_skipped, name)
        columns = zip(*(vars(part).values() for part in found), strict=True)
        skipped = [(samples[row].id, reason) for row, reason in reasons.items()]
        return Embedded(*map(torch.cat, columns)), skipped


def write_embedded(
    folder: Path, embedded: Embedded, inputs: str, skipped: list[tuple[str, str]]
) -> None:
    """Keep features in a folder. inputs: what they were made from."""
    write_skipped(folder, skipped, log)
    write_tensors(folder / FEATURES, vars(embedded), {INPUTS: inputs})


def read_embedded(folder: Path, inputs: str) -> tuple[Embedded, int] | None:
    """The features in a folder and how many images could not be read; None if made from others."""
    tensors = read_cached(folder / FEATURES, inputs)
    if tensors is None:
        return None
    return Embedded(**tensors), len(read_skipped(folder))


def read_cached(path: Path, inputs: str) -> dict[str, Tensor] | None:
    """Tensors of a file that was made from these inputs; None if there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        made_from = read_tensor_metadata(path).get(INPUTS)
        return read_tensors(path) if made_from == inputs else None
    except MoceError as error:
        log(f"{error}: computing it again")
        return None
