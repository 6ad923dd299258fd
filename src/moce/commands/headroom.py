"""moce headroom: before any experts are trained, what could they gain on these images?

The MAE is trained on for a few steps on all images, and on each group of clusters alone for the
group's share of them, so that each image is seen as often: an expert, too, sees its share only. What
the second lowers the error of the group's held-out images below the first is what an expert with
all of the network to itself could gain, an upper bound; where training on everything is as good,
there is nothing to gain.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce.clustering.grouping import group_clusters
from moce.commands.setup import read_images, refuse_unused, resolve, start_run
from moce.config import HeadroomSettings
from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.inference.assign import assign_images
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_json
from moce.training.objectives import MAEObjective
from moce.training.trainer import fit, total_steps
from moce.weights.from_runs import load_clusters
from moce.weights.resolve import start_from

HELD_OUT = 0.1  # share of the images that errors are measured on
MOST_HELD_OUT = 4000
SMALLEST_GROUP = 64  # images
# Between what gained no accuracy and what did: see docs/log.md.
WORTHWHILE = 0.04


@dataclass
class GroupGain:
    """One group of clusters; errors on its held-out images after training on all, and on it alone."""

    images: int
    error_all: float
    error_alone: float

    @property
    def gain(self) -> float:
        """By what share training on the group alone lowers the error further."""
        return 1 - self.error_alone / self.error_all

    @property
    def worthwhile(self) -> bool:
        """Whether an expert of its own is likely to pay for this group."""
        return self.gain >= WORTHWHILE


@dataclass
class HeadroomResult:
    """gain: mean over the groups, weighted by their images; steps: on all images."""

    run: Path
    groups: list[GroupGain]
    gain: float
    steps: int

    @property
    def worthwhile(self) -> bool:
        """Whether experts are likely to pay for any group."""
        return any(group.worthwhile for group in self.groups)

    def summary(self) -> str:
        lines = [
            f"group {number}: {group.images} images, error {group.error_all:.4f} trained on all, "
            f"{group.error_alone:.4f} alone ({100 * group.gain:+.1f} %)"
            for number, group in enumerate(self.groups)
        ]
        paying = [str(number) for number, group in enumerate(self.groups) if group.worthwhile]
        verdict = (
            "training on everything serves the groups as well; experts are unlikely to pay yet "
            "(a smaller model, longer pre-training or more unlike images would change that)"
        )
        if paying:
            groups = f"group{'s' if len(paying) > 1 else ''} {', '.join(paying)}"
            verdict = f"experts are likely to pay for images like those of {groups}"
        return "\n".join([*lines, f"headroom {100 * self.gain:+.2f} %: {verdict}"])

    def to_json(self) -> dict[str, Any]:
        groups = [
            {**asdict(group), "gain": group.gain, "worthwhile": group.worthwhile}
            for group in self.groups
        ]
        values = {**asdict(self), "run": str(self.run), "groups": groups}
        return {**values, "worthwhile": self.worthwhile}


def run(settings: HeadroomSettings) -> HeadroomResult:
    refuse_unused(settings, {"epochs"}, "headroom is counted in --steps")
    settings, device = resolve(settings)
    spec, mae = start_from(settings.mae, settings)
    clusters = load_clusters(settings.clusters)
    if settings.num_groups > clusters.num_clusters:
        raise MoceError(
            f"{settings.num_groups} groups need as many clusters; there are {clusters.num_clusters}"
        )
    images = read_images(settings, settings.data, mae.encoder)
    cluster_of = assign_images(
        settings.clusters,
        clusters,
        images,
        data=settings.data,
        device=device,
        precision=settings.precision,
        load_larger=lambda: read_images(settings, settings.data, clusters.encoder),
    )
    group_of = group_clusters(
        clusters.centroids, settings.num_groups, settings.seed, projected=False
    )[cluster_of]
    held, seen = split(len(images), settings.seed)
    check_groups(group_of[seen], settings.num_groups)
    if int(group_of[held].bincount(minlength=settings.num_groups).min()) == 0:
        raise MoceError("a group has no held-out image; lower --num-groups")
    start_run(settings, images)
    steps = total_steps(settings, len(seen))
    work = _Work(settings, device, spec.encoder, mae, images)
    everyone = work.train("all", seen, steps)
    groups = []
    for number in range(settings.num_groups):
        mine = group_of == number
        rows = seen[mine[seen]]
        alone = work.train(f"group{number}", rows, max(1, round(steps * len(rows) / len(seen))))
        test = held[mine[held]]
        errors = work.error(everyone, test), work.error(alone, test)
        groups.append(GroupGain(int(mine.sum()), *errors))
    total = sum(group.images for group in groups)
    gain = sum(group.gain * group.images for group in groups) / total
    result = HeadroomResult(settings.out, groups, gain, steps)
    write_json(settings.out / "results.json", result.to_json())
    return result


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows held out and rows to train on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    number = min(MOST_HELD_OUT, round(HELD_OUT * count))
    return order[:number].sort().values, order[number:].sort().values


def check_groups(group_of: Tensor, num_groups: int) -> None:
    """Raise MoceError if a group has too few images to say anything."""
    smallest = int(group_of.bincount(minlength=num_groups).min())
    if smallest < SMALLEST_GROUP:
        raise MoceError(f"the smallest group has {smallest} images; lower --num-groups")


@dataclass
class _Work:
    settings: HeadroomSettings
    device: torch.device
    spec: EncoderSpec
    mae: MAE
    images: ImageDataset

    def train(self, name: str, rows: Tensor, steps: int) -> MAE:
        """A copy of the MAE trained on for some steps on these images."""
        mae = copy.deepcopy(self.mae)
        folder = self.settings.out / name
        settings = self.settings.model_copy(update={"out": folder, "steps": steps})
        folder.mkdir(exist_ok=True)
        part = self.images.subset(rows.tolist())
        fit(
            MAEObjective(name, mae, self.spec, part, settings),
            settings,
            self.device,
            settings.precision,
        )
        return mae

    def error(self, mae: MAE, rows: Tensor) -> float:
        part = self.images.subset(rows.tolist())
        return reconstruction_error(
            mae, self.spec, part, device=self.device, precision=self.settings.precision
        )
