"""Task-adaptive pre-training: continue a masked autoencoder on a task's images and on related ones.

Text models gain from it ("Don't Stop Pretraining", arXiv 2004.10964), and so do masked autoencoders.
The clusters say which images of the pool are related: those of the task's own clusters, drawn in
proportion to the task's histogram. Labels are not used. A held-out part of the task's images watches
the reconstruction error, and the best state is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moce.config import AdaptationSettings
from moce.data.dataset import ImageDataset
from moce.data.rng import Stream, keyed_generator
from moce.errors import counted
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE, MAESpec
from moce.runtime.progress import duration, log
from moce.training.announce import seconds_per_image
from moce.training.micro_batch import settle_micro_batch
from moce.training.objectives import MAEObjective
from moce.training.trainer import fit

ADAPTATION = "adaptation.json"
HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share of the task's images, and images
FEWEST_TO_HOLD_OUT = 10  # task images; with fewer, all of them train
CHECKS = 8  # of the held-out error during a run
FEWEST_STEPS, FEWEST_EPOCHS = 700, 5  # by default: optimizer steps, passes over the task's images


@dataclass(frozen=True)
class Adaptation:
    """What an adaptation did, as adaptation.json stores it.

    steps: of the optimizer; task_images, pool_images: distinct images that it trained on; held_out:
    images that watched the error; error_before, error_after: their mean reconstruction error (None
    without held-out images), after it that of the state that was kept.
    """

    steps: int
    task_images: int
    pool_images: int
    held_out: int
    error_before: float | None
    error_after: float | None


def default_steps(num_images: int, batch_size: int, pool_share: float) -> int:
    """Optimizer steps for a task of `num_images`: 700, or more to see each image five times."""
    own = max(1.0, batch_size * (1 - pool_share))
    return max(FEWEST_STEPS, math.ceil(FEWEST_EPOCHS * num_images / own))


def adapt(
    spec: MAESpec,
    mae: MAE,
    images: ImageDataset,
    num_task: int,
    settings: AdaptationSettings,
    device: torch.device,
) -> Adaptation:
    """Train `mae` in place on a task's images and on related ones; it ends in its best state.

    images: the task's first, `num_task` of them, then the pool's. Metrics and
    checkpoints go to `settings.out`; a run can be resumed.
    """
    own, held_out = split_task(num_task, settings.seed)
    num_pool = len(images) - num_task
    rows = [*own, *range(num_task, len(images))]
    mixed = mixed_rows(len(own), num_pool, settings.pool_share)
    objective = MAEObjective(
        "adapt", mae, spec.encoder, images.subset([rows[row] for row in mixed]), settings
    )
    watch = HeldOutError(mae, spec.encoder, images.subset(held_out), device, settings.precision)
    before = None
    if held_out:
        before = watch()["held_out"]  # the state to beat
        objective.diagnostics = watch
    settings = settle_micro_batch(objective, settings, device)
    size = settings.batch_size
    count = min(size, settings.images_per_pass or size)
    seconds = (settings.steps or 0) * size * seconds_per_image(objective, settings, device, count)
    log(
        f"adapting to {len(own)} task images and {num_pool} related ones, {len(held_out)} held out: "
        f"{counted(settings.steps or 0, 'step')} of {settings.batch_size}, about {duration(seconds)}"
    )
    fit(objective, settings, device, settings.precision)
    after = watch.restore_best() if held_out else None
    steps = settings.steps or 0
    return Adaptation(steps, len(own), num_pool, len(held_out), before, after)


def split_task(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows of `count` task images: those that train, and those held out to watch the error."""
    order = torch.randperm(count, generator=keyed_generator(seed, Stream.ORDER, -1)).tolist()
    held_out = min(MOST_HELD_OUT, int(HELD_OUT * count)) if count >= FEWEST_TO_HOLD_OUT else 0
    return sorted(order[held_out:]), sorted(order[:held_out])


def mixed_rows(num_task: int, num_pool: int, pool_share: float) -> list[int]:
    """Rows of a dataset (task images first, then the pool's) in which the pool has `pool_share`.

    Images of the smaller part are repeated; repetitions are augmented and masked differently.
    """
    if num_pool == 0 or pool_share == 0:
        return list(range(num_task))
    task, pool = range(num_task), range(num_task, num_task + num_pool)
    if pool_share == 1:
        return list(pool)
    length = max(num_task / (1 - pool_share), num_pool / pool_share)
    counts = (round(length * (1 - pool_share)), round(length * pool_share))
    return [
        rows[i % len(rows)] for rows, n in zip((task, pool), counts, strict=True) for i in range(n)
    ]


@dataclass
class HeldOutError:
    """Diagnostics of an adaptation: the held-out reconstruction error; keeps the best state.

    `state` goes into checkpoints, so that a resumed run knows the best state so far.
    """

    mae: MAE
    spec: EncoderSpec
    images: ImageDataset
    device: torch.device
    precision: str

    def __post_init__(self) -> None:
        self.state: dict[str, Tensor] = {"best_error": torch.tensor(math.inf)}

    def __call__(self) -> dict[str, float]:
        """The error of the current state, [0, inf); remembers the state if it is the best."""
        training = self.mae.training
        error = reconstruction_error(
            self.mae, self.spec, self.images, device=self.device, precision=self.precision
        )
        self.mae.train(training)
        if error < float(self.state["best_error"]):
            weights = {
                f"best.{k}": v.detach().cpu().clone() for k, v in self.mae.state_dict().items()
            }
            self.state |= {"best_error": torch.tensor(error), **weights}
        return {"held_out": error}

    def restore_best(self) -> float:
        """Load the best state into the MAE; its error."""
        best = {k.removeprefix("best."): v for k, v in self.state.items() if k.startswith("best.")}
        if best:
            self.mae.load_state_dict(best)
        return float(self.state["best_error"])
