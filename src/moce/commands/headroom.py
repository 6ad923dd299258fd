"""moce headroom: what experts could gain on these images, before any are trained.

The MAE is trained a little further, once on all images and once on each group of clusters alone, for
the group's share of the steps, so that each image is seen equally often. Headroom is how far the
second error on the group's held-out images falls below the first: an upper bound of what an expert
could gain, since it has the whole network to itself.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moce.clustering.grouping import group_clusters
from moce.commands.setup import decoded, read_images, resolve, start_run
from moce.config import HeadroomSettings
from moce.data.dataset import ImageDataset
from moce.errors import MoceError, counted
from moce.inference.assign import assign_images
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_json
from moce.training.micro_batch import settle_micro_batch
from moce.training.objectives import MAEObjective
from moce.training.trainer import fit, total_steps
from moce.weights.from_runs import load_clusters
from moce.weights.resolve import start_from

HELD_OUT = 0.1  # share of the images that errors are measured on
MOST_HELD_OUT = 4000
SMALLEST_GROUP = 64  # images
# Separates runs whose experts gained accuracy from those that did not: see docs/log.md.
WORTHWHILE = 0.04
FEWEST_PASSES = 2  # over a group's images, below which both errors are still those of the start


@dataclass
class GroupGain:
    """A group of clusters: held-out errors after training on all images and on the group alone.

    gain: how far training on the group alone lowers the error, as a share; worthwhile: whether an
    expert is likely to pay for this group, None after too few passes over its images to tell.
    """

    images: int
    error_all: float
    error_alone: float
    passes: float
    gain: float = field(init=False)
    worthwhile: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.gain = 1 - self.error_alone / self.error_all
        self.worthwhile = self.gain >= WORTHWHILE if self.passes >= FEWEST_PASSES else None


@dataclass
class HeadroomResult:
    """gain: mean over the groups, weighted by their images; worthwhile: for any group, None if too few
    passes tell of none; steps: on all images.
    """

    run: Path
    groups: list[GroupGain]
    gain: float
    steps: int
    worthwhile: bool | None

    def summary(self) -> str:
        lines = [
            f"group {number}: {counted(group.images, 'image')}, seen {group.passes:.1f} times, error "
            f"{group.error_all:.4f} trained on all, "
            f"{group.error_alone:.4f} alone ({100 * group.gain:+.1f} %)"
            f"{': experts are likely to pay' if group.worthwhile else ''}"
            for number, group in enumerate(self.groups)
        ]
        passes = min(group.passes for group in self.groups)
        if passes < FEWEST_PASSES:
            enough = math.ceil(self.steps * FEWEST_PASSES / passes)
            lines.append(
                f"no verdict: after {passes:.1f} passes over a group's images the errors tell too "
                f"little; from {FEWEST_PASSES} on they do: --steps {enough}"
            )
        elif not self.worthwhile:
            lines.append(
                "experts are unlikely to pay yet: training on all images is as good for the groups (a "
                "smaller model, longer pre-training or more diverse images could change that)"
            )
        return "\n".join([*lines, f"headroom {100 * self.gain:+.2f} %"])


def run(settings: HeadroomSettings) -> HeadroomResult:
    settings, device = resolve(settings)
    spec, mae = start_from(settings.mae, settings)
    clusters = load_clusters(settings.clusters)
    if settings.num_groups > clusters.num_clusters:
        raise MoceError(
            f"{settings.num_groups} groups need at least as many clusters, not {clusters.num_clusters}"
        )
    images = read_images(settings, settings.data, mae.encoder, keep_tiny=True)
    images, cluster_of = assign_images(
        settings.clusters,
        clusters,
        images,
        data=settings.data,
        device=device,
        precision=settings.precision,
        decode=lambda some: decoded(settings, settings.data, some, clusters.encoder),
    )
    sizes = cluster_of.bincount(minlength=clusters.num_clusters)
    group_of = group_clusters(clusters.centroids, sizes, settings.num_groups)[cluster_of]
    held, seen = split(len(images), settings.seed)
    check_groups(group_of[seen], settings.num_groups)
    if int(group_of[held].bincount(minlength=settings.num_groups).min()) == 0:
        raise MoceError("a group has no held-out image; lower --num-groups")
    start_run(settings, images)
    steps = total_steps(settings, len(seen))
    trainer = _Trainer(settings, device, spec.encoder, mae, images)
    on_all = trainer.train("all", seen, steps)
    groups = []
    for number in range(settings.num_groups):
        mine = group_of == number
        rows = seen[mine[seen]]
        own_steps = max(1, round(steps * len(rows) / len(seen)))
        alone = trainer.train(f"group{number}", rows, own_steps)
        test = held[mine[held]]
        errors = trainer.error(on_all, test), trainer.error(alone, test)
        passes = own_steps * settings.batch_size / len(rows)
        groups.append(GroupGain(int(mine.sum()), *errors, passes))
    total = sum(group.images for group in groups)
    gain = sum(group.gain * group.images for group in groups) / total
    told = [group.worthwhile for group in groups if group.worthwhile is not None]
    worthwhile = any(told) if told else None
    result = HeadroomResult(settings.out, groups, gain, steps, worthwhile)
    write_json(settings.out / "results.json", {**asdict(result), "run": str(settings.out)})
    return result


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows held out and rows to train on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    number = min(MOST_HELD_OUT, round(HELD_OUT * count))
    return order[:number].sort().values, order[number:].sort().values


def check_groups(group_of: Tensor, num_groups: int) -> None:
    """Raise MoceError if a group has too few images for an estimate."""
    smallest = int(group_of.bincount(minlength=num_groups).min())
    if smallest < SMALLEST_GROUP:
        raise MoceError(f"the smallest group has {counted(smallest, 'image')}; lower --num-groups")


@dataclass
class _Trainer:
    settings: HeadroomSettings
    device: torch.device
    spec: EncoderSpec
    mae: MAE
    images: ImageDataset

    def train(self, name: str, rows: Tensor, steps: int) -> MAE:
        """Train a copy of the MAE for some steps on these images."""
        mae = copy.deepcopy(self.mae)
        folder = self.settings.out / name
        settings = self.settings.model_copy(update={"out": folder, "steps": steps})
        folder.mkdir(exist_ok=True)
        images = self.images.subset(rows.tolist())
        objective = MAEObjective(name, mae, self.spec, images, settings)
        settings = settle_micro_batch(objective, settings, self.device)
        fit(objective, settings, self.device, settings.precision)
        return mae

    def error(self, mae: MAE, rows: Tensor) -> float:
        images = self.images.subset(rows.tolist())
        return reconstruction_error(
            mae, self.spec, images, device=self.device, precision=self.settings.precision
        )
