"""moce customize: a dense backbone for a task, from its images (stage 3), adapted to it if asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moce.commands.setup import (
    check_output,
    open_output,
    pixel_file,
    prepare,
    read_images,
    start_run,
)
from moce.config import AdaptationSettings, CustomizeSettings
from moce.config.usage import check_used
from moce.customization.adaptation import Adaptation
from moce.customization.adapter import Adapter, with_steps
from moce.customization.bank import Bank, load
from moce.customization.model_card import (
    adaptation_facts,
    scores_facts,
    share_of_votes,
    similarity_fact,
    write_backbone,
)
from moce.customization.related_images import RelatedImages, known_clusters
from moce.customization.selection import Choice, route_name
from moce.data.divide import voting_rows
from moce.data.load import chosen_samples, load_images
from moce.errors import MoceError, counted
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import EncoderSpec, fit_of, input_channels
from moce.models.mae import MAE, MAESpec
from moce.runs.model import write_skipped
from moce.runtime.distributed import run_on_rank0
from moce.runtime.progress import log
from moce.training.defaults import default_lr
from moce.weights.export import Model, check_format
from moce.weights.from_runs import holds_moce, load_clusters, moce_run
from moce.weights.resolve import refuse_given, start_from


@dataclass
class CustomizeResult:
    """folder: the backbone; choice: its experts (None from an MAE); load_it: the Python that loads it.

    adaptation: what was done beyond choosing experts; None if nothing was.
    """

    folder: Path
    choice: Choice | None
    load_it: str
    adaptation: Adaptation | None = None

    def summary(self) -> str:
        lines = [] if self.choice is None else _choice_lines(self.choice)
        if self.adaptation is not None:
            lines += adaptation_facts(self.adaptation)
        return "\n".join([*lines, f"load it:\n{self.load_it}"])

    def to_json(self) -> dict[str, Any]:
        content = {} if self.choice is None else self.choice.to_json()
        if self.adaptation is not None:
            content["adaptation"] = asdict(self.adaptation)
        return {"folder": str(self.folder), **content}


def _choice_lines(choice: Choice) -> list[str]:
    votes = [
        f"route {route_name(route)}: {counted(n, 'image')}" for route, n in choice.votes.items()
    ]
    return [
        *votes,
        f"strategy {choice.strategy}; the winner has the votes of {share_of_votes(choice)}",
        similarity_fact(choice),
        *scores_facts(choice),
    ]


def run(settings: CustomizeSettings) -> CustomizeResult:
    check_used(settings, settings)
    check_output(settings)
    device, precision = prepare(settings)
    settings = settings.model_copy(update={"device": device.type, "precision": precision})
    mixture = moce_run(settings.run) is not None and holds_moce(settings.run)
    if settings.adapt_steps and not mixture:
        return _from_mae(settings, device)
    refuse_given(settings, f"run {settings.run}")
    return _from_experts(settings, device)


def _from_experts(settings: CustomizeSettings, device: torch.device) -> CustomizeResult:
    bank = load(settings.run)
    bank.device, bank.precision = device, settings.precision
    choice, skipped = _choose(settings, bank)
    mae = bank.mae(choice)
    check_format(settings.format, Model(bank.encoder_spec, mae.encoder))
    adaptation = None
    if settings.adapt_steps:
        adaptation = _adapt(settings, device, bank.spec.mae, mae, bank.clusters, choice.strategy)
    else:
        open_output(settings)
        write_skipped(settings.out, skipped, log)
    return _finish(settings, bank.encoder_spec, mae, choice, adaptation)


def _from_mae(settings: CustomizeSettings, device: torch.device) -> CustomizeResult:
    if settings.data is not None and settings.clusters is None:
        raise MoceError("--data needs --clusters RUN (of moce cluster), to find related images")
    spec, mae = start_from(settings.run, settings)
    check_format(settings.format, Model(spec.encoder, mae.encoder))
    clusters = None if settings.clusters is None else load_clusters(settings.clusters)
    adaptation = _adapt(settings, device, spec, mae, clusters)
    return _finish(settings, spec.encoder, mae, None, adaptation)


def _finish(
    settings: CustomizeSettings,
    spec: EncoderSpec,
    mae: MAE,
    choice: Choice | None,
    adaptation: Adaptation | None,
) -> CustomizeResult:
    model = Model(spec, mae.encoder.cpu())
    source, kind = settings.run, settings.format
    load_it = run_on_rank0(
        lambda: write_backbone(settings.out, kind, model, source, choice, adaptation)
    )
    return CustomizeResult(settings.out, choice, load_it, adaptation)


def _choose(settings: CustomizeSettings, bank: Bank) -> tuple[Choice, list[tuple[str, str]]]:
    """The choice, and the ids and reasons of images that could not be read."""
    store = pixel_file(settings)
    if settings.strategy == "probe":
        from moce.evaluation.evaluator import choose_by_probe  # scikit-learn takes a second
        from moce.evaluation.task import load_task

        task = load_task(settings.images, bank.task_shape, store, settings.max_skipped)
        chosen = choose_by_probe(bank, task.train, task.train_labels, len(task.classes))
        return run_on_rank0(lambda: chosen), task.skipped  # the same for all processes
    encoder = bank.clusters.encoder
    images = load_images(
        settings.images,
        fit_of(encoder),
        store,
        channels=input_channels(encoder),
        max_skipped=settings.max_skipped,
        choose=voting_rows,
    )
    by = (settings.strategy, settings.threshold, settings.assign, settings.batch_size)
    choice = bank.select(images, *by)
    return run_on_rank0(lambda: choice), images.skipped


def _adapt(
    settings: CustomizeSettings,
    device: torch.device,
    spec: MAESpec,
    mae: MAE,
    clusters: ClusterModel | None,
    strategy: str | None = None,
) -> Adaptation:
    """Adapt an MAE to the task's images; `clusters` find related images of the pool."""
    task = chosen_samples(settings.images, voting_rows)
    training = _training_settings(settings, len(task), strategy)
    load = partial(read_images, settings, keep_tiny=True)
    related = None
    if settings.data is not None and clusters is not None:
        mixture = settings.run if strategy is not None else None
        known = known_clusters(settings.data, clusters, settings.clusters, mixture)
        related = RelatedImages(settings.data, clusters, known, load, device, settings.precision)
    return Adapter(related, load, start_run, device).run(task, spec, mae, training)


def _training_settings(
    settings: CustomizeSettings, num_images: int, strategy: str | None
) -> AdaptationSettings:
    same = CustomizeSettings.model_fields.keys() & AdaptationSettings.model_fields.keys()
    own = {"strategy", "batch_size", "pool_share"}  # of the same name, but another meaning
    given = AdaptationSettings(
        **{name: getattr(settings, name) for name in same - own},
        choice=strategy,
        pool_share=settings.pool_share if settings.data else 0.0,
        batch_size=settings.adapt_batch_size,
        base_lr=settings.adapt_lr or default_lr(settings.run),
    )
    return with_steps(given, settings.adapt_steps, num_images)
