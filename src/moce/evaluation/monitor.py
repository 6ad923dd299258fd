"""Measurements while an encoder trains: probes on labeled tasks, RankMe, and pictures.

No random number is drawn and no weight is changed: training is the same to the bit without them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.utils import make_grid

from moce.customization.bank import Bank
from moce.data.dataset import ImageDataset
from moce.data.loader import in_order
from moce.errors import NotFinite, counted
from moce.evaluation.task import Task
from moce.inference.features import extract_features
from moce.inference.rankme import rankme
from moce.inference.reconstructions import Reconstructed, as_rgb, reconstruct
from moce.models.encoder import EncoderSpec, fit_of
from moce.models.mae import MAE
from moce.runs.files import atomic, make_folder
from moce.runs.model import PICTURES
from moce.runtime.device import autocast
from moce.runtime.launch import is_rank0
from moce.runtime.progress import duration
from moce.training.metrics import remedy
from moce.training.monitoring import Measured, evaluating

SHOWN = 8  # images of a picture
MOST_PICTURES = 20  # of a run
GAP = 2  # pixels between images
KINDS = {"knn": "k-NN", "linear": "linear"}


@dataclass
class Dense:
    """A network whose encoder serves every task. module: what trains; mae: None if it does not fill in."""

    module: nn.Module
    vit: VisionTransformer
    spec: EncoderSpec
    mae: MAE | None = None

    @property
    def fills_in(self) -> bool:
        """Whether it reconstructs images."""
        return self.mae is not None

    def prepare(self, tasks: Mapping[str, Task], shown: ImageDataset) -> None:
        """Nothing has to be known of tasks and images beforehand."""

    def encoder(self, task: str | None = None) -> tuple[VisionTransformer, dict[str, Any]]:
        """The encoder to measure, and what to note of it."""
        return self.vit, {}

    def reconstruct(self, pixels: Tensor) -> Reconstructed | None:
        return None if self.mae is None else reconstruct(self.mae, self.spec, pixels)


@dataclass
class Mixture:
    """A MoCE: a task gets the backbone that `moce customize` would choose for it at this step.

    Without a task it is the generalist, all experts averaged by their training images. Pictures are
    made by the experts of each image's cluster.
    """

    bank: Bank
    fills_in: ClassVar[bool] = True
    _votes: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    _clusters: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def module(self) -> nn.Module:
        return self.bank.model

    @property
    def vit(self) -> VisionTransformer:
        return self.bank.model.mae.encoder

    @property
    def spec(self) -> EncoderSpec:
        return self.bank.encoder_spec

    def prepare(self, tasks: Mapping[str, Task], shown: ImageDataset) -> None:
        """Find the clusters of the tasks' training images and of those to show: they stay."""
        bank = self.bank
        for name, task in tasks.items():
            cluster, similarity = bank.assign(task.train)
            histogram = cluster.bincount(minlength=bank.clusters.num_clusters)
            self._votes[name] = histogram, similarity.mean().item()
        self._clusters = bank.assign(shown)[0]
        bank.clusters.encoder.cpu()

    def encoder(self, task: str | None = None) -> tuple[VisionTransformer, dict[str, Any]]:
        bank = self.bank
        if task is None:
            sizes = bank.model.cluster_sizes.long().cpu()
            return bank.backbone(bank.choose(sizes, bank.clusters.similarity, "generalist")), {}
        choice = bank.choose(*self._votes[task], "auto")
        return bank.backbone(choice), {"strategy": choice.strategy}

    def reconstruct(self, pixels: Tensor) -> Reconstructed | None:
        return reconstruct(self.bank.model, self.spec, pixels, self._clusters.to(pixels.device))


@dataclass
class Monitor:
    """Measures a network every so many steps.

    sample: training images, for RankMe; the first of them are shown. tasks: by name. every: steps;
    log_every: between rows, which measurements are parts of; total: steps of the run. from_start:
    also before the first step; cheap: the interval was chosen to cost little.
    """

    network: Dense | Mixture
    sample: ImageDataset
    tasks: dict[str, Task]
    every: int
    log_every: int
    total: int
    from_start: bool
    cheap: bool
    folder: Path
    device: torch.device
    precision: str
    note: str = ""
    _first: Measured | None = None

    @property
    def apart(self) -> int:
        """Steps between measurements, about: a row has one at most."""
        return max(self.every, self.log_every)

    def due(self, step: int) -> bool:
        """Whether a multiple of `every` is among the steps since the last row; always after the last."""
        if step in (0, self.total):
            return step > 0 or self.from_start
        before = (step - 1) // self.log_every * self.log_every
        return step // self.every > before // self.every

    @torch.no_grad()
    def measure(self, step: int) -> Measured:
        """RankMe, k-NN and linear probe of every task, and a picture at some of the steps."""
        if step == 0 and self._first is not None:
            return self._first
        with evaluating(self.network.module, self.device):
            vit, _ = self.network.encoder()
            row: dict[str, Any] = {"rankme": rankme(self._features(vit, self.sample))}
            if self.tasks:
                row["monitor"] = {n: self._scores(n, task) for n, task in self.tasks.items()}
            measured = Measured(row, self._picture(step))
        self.note = summary_of(row)
        return measured

    def header(self, seconds: float | None) -> list[str]:
        """Measures before the first step to tell the cost, unless that is known to be small."""
        times = max(1, self.total // self.apart)
        tasks = [
            f"{name} ({len(t.train):,} + {len(t.test):,} images)" for name, t in self.tasks.items()
        ]
        probes = f"k-NN and linear probe on {', '.join(tasks)}; " if tasks else ""
        what = (
            f"every {counted(self.apart, 'step')} ({counted(times, 'time')}): {probes}RankMe on "
            f"{counted(len(self.sample), 'image')}"
            f"{', and pictures of reconstructions' if self.network.fills_in else ''}"
        )
        if not self.from_start:
            return [f"{what}{'; about 1 % of the time' if self.cheap else ''}"]
        if not is_rank0():
            return []
        start = time.perf_counter()
        self._first = self.measure(0)
        each = time.perf_counter() - start
        share = f", {times * each / seconds:.1%} of the training" if seconds else ""
        return [
            f"{what}; about {duration(times * each)} in all{share}",
            f"before training: {self.note}",
        ]

    def _features(self, vit: VisionTransformer, images: ImageDataset) -> Tensor:
        """[n, width]. Raises NotFinite if the weights have overflowed."""
        found = extract_features(
            vit, self.network.spec, images, device=self.device, precision=self.precision
        )
        if not found.isfinite().all():
            raise NotFinite(f"the features are not finite; {remedy(self.folder)}")
        return found

    def _scores(self, name: str, task: Task) -> dict[str, Any]:
        """The default metric of `moce probe`, 0..1, with its default settings for features."""
        # Here, because scikit-learn takes a second, and most runs are not monitored.
        from moce.evaluation.metrics import choose_metric, score
        from moce.evaluation.sklearn_probe import knn_scores, linear_scores

        vit, noted = self.network.encoder(name)
        train, test = (self._features(vit, images).numpy() for images in (task.train, task.test))
        given = train, task.train_labels, test, len(task.classes)
        metric = choose_metric(None, task)
        found = {"knn": knn_scores(*given), "linear": linear_scores(*given)}
        values = {kind: score(metric, s, task.test_labels) for kind, s in found.items()}
        return {**values, **noted}

    def _picture(self, step: int) -> np.ndarray | None:
        """Some images, masked, and filled in, in three rows: [h, w, 3] uint8, also as a file."""
        if not self._pictured(step):
            return None
        shown = self.sample.subset(range(min(SHOWN, len(self.sample))))
        size = fit_of(self.network.vit)
        pixels = torch.cat(list(in_order(shown, SHOWN, self.device, size)))
        with autocast(self.device, self.precision):
            found = self.network.reconstruct(pixels)
        if found is None:
            return None
        rows = torch.cat([pixels, found.masked, found.filled]).cpu()
        grid = make_grid(as_rgb(rows), len(pixels), GAP, pad_value=255)
        picture = grid.permute(1, 2, 0).contiguous().numpy()
        make_folder(self.folder / PICTURES)
        with atomic(self.folder / PICTURES / f"step_{step:09d}.png") as temporary:
            Image.fromarray(picture).save(temporary, "PNG")
        return picture

    def _pictured(self, step: int) -> bool:
        """At most MOST_PICTURES of the measurements have a picture: evenly spread, first and last too."""
        stride = math.ceil(max(1, self.total // self.apart) / (MOST_PICTURES - 2))
        return step == self.total or step // self.apart % stride == 0


def summary_of(row: dict[str, Any]) -> str:
    """A measurement for the progress line: the scores, of several tasks the means, or the rank."""
    found = row.get("monitor", {})
    if not found:
        return f"RankMe {row['rankme']:.1f}"
    means = {kind: np.mean([values[kind] for values in found.values()]) for kind in KINDS}
    name = next(iter(found)) if len(found) == 1 else f"{len(found)} tasks"
    return f"{name}: " + ", ".join(f"{KINDS[k]} {100 * mean:.1f} %" for k, mean in means.items())
