"""What the page shows: the map and its colors, clusters and their experts, and images that are dropped."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moce.customization.bank import Bank
from moce.customization.selection import Choice, route_name
from moce.data.domains import domain_of, find_domains
from moce.data.readers.sample import Encoded, Label, Sample, is_image_name, suffix_of
from moce.data.readers.table import ids_of, labels_and_splits
from moce.errors import MoceError
from moce.explorer.embedding import Embedded, Embedder
from moce.explorer.pictures import Thumbnails
from moce.explorer.projection import nearest, place
from moce.explorer.reconstruction import Reconstructor, name_of
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import input_channels

MOST_SHOWN = 240  # images of a cluster
NEAREST = 6
NO_LABEL = "no label"


@dataclass
class Coloring:
    """names: of the groups, most images first; of: [m] int32, the group of every image."""

    title: str
    names: list[str]
    of: Tensor

    @classmethod
    def by(cls, title: str, values: Sequence[str]) -> Coloring:
        names = [name for name, _ in Counter(values).most_common()]
        number = {name: row for row, name in enumerate(names)}
        return cls(title, names, torch.tensor([number[value] for value in values]).int())

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "names": self.names, "of": packed(self.of)}


@dataclass
class Dropped:
    """Images of the user in a folder of their own. skipped: (name, reason) of those not readable."""

    folder: Path
    samples: list[Sample]
    embedded: Embedded
    skipped: list[tuple[str, str]] = field(default_factory=list)


class Explorer:
    """A map of images and what a run makes of them.

    samples: the images of DATA; embedded: those that can be read, in cluster space; places: [m, 2]
    their coordinates; bank: of a MoCE run, None of a clustering.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        embedded: Embedded,
        places: Tensor,
        embedder: Embedder,
        bank: Bank | None,
        reconstructor: Reconstructor,
    ) -> None:
        self.embedded, self.places, self.embedder = embedded, places, embedder
        self.bank, self.reconstructor = bank, reconstructor
        self.routes = None if bank is None else bank.model.routes()
        rows = embedded.rows.tolist()
        labels, ids = labels_and_splits(samples)[0], ids_of(samples)
        self.labels = [_text(labels[row]) for row in rows]
        self.ids = [ids[row] for row in rows]
        self._thumbnails = Thumbnails(samples, input_channels(self.clusters.encoder))

    @property
    def clusters(self) -> ClusterModel:
        return self.embedder.clusters

    def thumbnail(self, point: int, size: int) -> bytes:
        """An image of the map as WebP."""
        return self._thumbnails.get(int(self.embedded.rows[point]), size)

    # --- the map ----------------------------------------------------------------------------------

    def map(self) -> dict[str, Any]:
        """Coordinates, colorings and names of all images."""
        return {
            "places": packed(self.places.float()),
            "colorings": [coloring.to_json() for coloring in self.colorings()],
            "ids": self.ids,
            "labels": self.labels if any(self.labels) else None,
            "cluster": packed(self.embedded.cluster.int()),
        }

    def colorings(self) -> list[Coloring]:
        """By cluster, route, expert of every block, label and folder, as far as there are such."""
        cluster = self.embedded.cluster
        found = [Coloring.by("cluster", [f"cluster {k}" for k in cluster.tolist()])]
        if self.bank is not None and self.routes is not None:
            names = [f"route {route_name(tuple(route))}" for route in self.routes.tolist()]
            found.append(Coloring.by("route", [names[k] for k in cluster.tolist()]))
            for number, block in enumerate(self.bank.model.blocks):
                expert = self.routes[:, number][cluster].tolist()
                found.append(Coloring.by(f"expert, block {block}", [f"expert {e}" for e in expert]))
        if any(self.labels):
            found.append(Coloring.by("label", [label or NO_LABEL for label in self.labels]))
        if find_domains(self.ids):
            found.append(Coloring.by("folder", [domain_of(name) for name in self.ids]))
        return found

    # --- a cluster --------------------------------------------------------------------------------

    @torch.no_grad()
    def cluster(self, number: int) -> dict[str, Any]:
        """Images of a cluster, most typical first, its labels and experts.

        Raises MoceError if there is no such cluster.
        """
        if not 0 <= number < self.clusters.num_clusters:
            raise MoceError(f"no cluster {number}: there are {self.clusters.num_clusters}")
        points = (self.embedded.cluster == number).nonzero()[:, 0]
        similarity = self.embedded.similarity[points]
        points = points[similarity.argsort(descending=True, stable=True)]
        labels = Counter(self.labels[point] for point in points.tolist() if self.labels[point])
        return {
            "cluster": number,
            "images": len(points),
            "trained_on": int(self.clusters.sizes[number]),
            "similarity": float(similarity.mean()) if len(points) else None,
            "points": points[:MOST_SHOWN].tolist(),
            "labels": labels.most_common(8),
            **self._experts(number),
        }

    def _experts(self, number: int) -> dict[str, Any]:
        if self.bank is None or self.routes is None:
            return {"route": None, "experts": []}
        route = tuple(self.routes[number].tolist())
        tables = zip(self.bank.model.blocks, route, self.bank.model.tables(), strict=True)
        return {
            "route": route_name(route),
            "route_images": self.bank.routes[route],
            "all_images": sum(self.bank.routes.values()),
            "experts": [
                {"block": block, "expert": expert, "gate": float(table[number, expert])}
                for block, expert, table in tables
            ],
        }

    # --- images of the user -----------------------------------------------------------------------

    def drop(self, folder: Path, names: dict[str, str]) -> Dropped:
        """Embed files in a folder. names: what the user calls each file.

        Raises MoceError if none of them can be read.
        """
        samples = [Sample(name, Encoded(folder / file)) for file, name in names.items()]
        embedded, reasons = self.embedder.embed(samples)
        skipped = [(samples[row].id, reason) for row, reason in reasons.items()]
        if not len(embedded):
            name, reason = skipped[0] if skipped else ("nothing", "no file was dropped")
            raise MoceError(
                f"none of {len(names)} files can be read as an image: {reason} (as {name})"
            )
        read = [samples[row] for row in embedded.rows.tolist()]
        return Dropped(folder, read, embedded, skipped)

    def choose(self, dropped: Dropped, strategy: str) -> Choice | None:
        """The experts for dropped images; None without experts."""
        if self.bank is None:
            return None
        cluster, similarity = dropped.embedded.cluster, dropped.embedded.similarity
        histogram = cluster.bincount(minlength=self.clusters.num_clusters)
        return self.bank.choose(histogram, similarity.mean().item(), strategy)

    def look_up(self, dropped: Dropped, strategy: str = "auto") -> dict[str, Any]:
        """Clusters, places and nearest images of dropped images, their votes and the choice."""
        features = dropped.embedded.features
        places = place(features, self.embedded.features, self.places)
        similarity, points = nearest(features, self.embedded.features, NEAREST)
        rows = zip(
            dropped.samples,
            dropped.embedded.cluster.tolist(),
            dropped.embedded.similarity.tolist(),
            places.tolist(),
            similarity.tolist(),
            points.tolist(),
            strict=True,
        )
        images = [
            {
                "name": sample.id,
                "cluster": cluster,
                "similarity": own,
                "place": where,
                "nearest": [
                    {"point": point, "similarity": how}
                    for how, point in zip(near, close, strict=True)
                ],
            }
            for sample, cluster, own, where, near, close in rows
        ]
        choice = self.choose(dropped, strategy)
        shown = None if choice is None else describe_choice(choice)
        return {"images": images, "skipped": dropped.skipped, "choice": shown}


def describe_choice(choice: Choice) -> dict[str, Any]:
    """A choice for the page: its name, the votes, and why in one sentence."""
    low, high = choice.share_by_chance
    share = f"{choice.share:.0%} of the images vote for route {route_name(choice.route)}"
    why = {
        "route": f"{share}: its experts are taken as they are.",
        "merge": f"{share}: experts are averaged by the votes.",
        "generalist": f"The images lie {choice.distance:.1f} times as far from their clusters as "
        "training images do: all experts are averaged.",
    }
    return {
        "name": name_of(choice),
        "strategy": choice.strategy,
        "route": route_name(choice.route),
        "share": choice.share,
        "by_chance": [low, high],
        "votes": [(route_name(route), count) for route, count in choice.votes.items()],
        "similarity": choice.similarity,
        "training_similarity": choice.training_similarity,
        "distance": choice.distance,
        "why": why[choice.strategy],
    }


def file_name(number: int, name: str) -> str:
    """A safe file name for a dropped file; the decoders go by the content, readers by the suffix."""
    suffix = suffix_of(name).lower() if is_image_name(name) else ".png"
    return f"{number:04d}{suffix}"


def packed(values: Tensor) -> str:
    """Numbers for the page: base64 of their bytes, little-endian."""
    array = np.ascontiguousarray(values.numpy())
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _text(label: Label | None) -> str:
    return " + ".join(label) if isinstance(label, tuple) else label or ""
