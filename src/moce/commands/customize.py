"""moce customize: a dense backbone for a task, from its images (stage 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce.commands.setup import open_output, pixel_file, prepare
from moce.config import CustomizeSettings
from moce.config.usage import check_used
from moce.customization.bank import Bank, load
from moce.customization.model_card import write_choice
from moce.customization.selection import Choice, route_name
from moce.data.load import load_images
from moce.evaluation.evaluator import choose_by_probe
from moce.evaluation.task import load_task
from moce.runs.model import write_skipped
from moce.runtime.progress import log
from moce.weights.export import Model, check_format


@dataclass
class CustomizeResult:
    """folder: the backbone; choice: its experts; load_it: the Python that loads it."""

    folder: Path
    choice: Choice
    load_it: str

    def summary(self) -> str:
        choice = self.choice
        votes = [f"route {route_name(route)}: {n} images" for route, n in choice.votes.items()]
        return "\n".join(
            [
                *votes,
                f"strategy {choice.strategy}; the winner has {choice.share:.0%} of the votes",
                f"similarity to the clusters {choice.similarity:.3f} "
                f"(training images: {choice.training_similarity:.3f})",
                f"load it:\n{self.load_it}",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.choice.to_json()}


def run(settings: CustomizeSettings) -> CustomizeResult:
    check_used(settings, settings)
    device, precision = prepare(settings)
    bank = load(settings.run)
    bank.device, bank.precision = device, precision
    choice, skipped = _choose(settings, bank)
    model = Model(bank.encoder_spec, bank.backbone(choice))
    check_format(settings.format, model)
    folder = open_output(settings)
    write_skipped(folder, skipped, log)
    load_it = write_choice(folder, settings.format, model, choice, settings.run)
    return CustomizeResult(folder, choice, load_it)


def _choose(settings: CustomizeSettings, bank: Bank) -> tuple[Choice, list[tuple[str, str]]]:
    """The choice, and the ids and reasons of images that could not be read."""
    store = pixel_file(settings)
    if settings.strategy == "probe":
        task = load_task(settings.images, bank.task_shape, store, settings.max_skipped)
        chosen = choose_by_probe(bank, task.train, task.train_labels, len(task.classes))
        return chosen, task.skipped
    channels, height, width = bank.input_shape
    images = load_images(
        settings.images,
        (height, width),
        store,
        channels=channels,
        max_skipped=settings.max_skipped,
    )
    choice = bank.select(
        images, settings.strategy, settings.threshold, settings.assign, settings.batch_size
    )
    return choice, images.skipped
