"""moce customize: a dense backbone for a task, from its images (stage 3), adapted to it if asked."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.commands.setup import check_output, open_output, pixel_file, prepare, start_run
from moce.config import AdaptationSettings, CustomizeSettings
from moce.config.usage import check_used
from moce.customization.adaptation import ADAPTATION, CHECKS, Adaptation, adapt, default_steps
from moce.customization.bank import Bank, load
from moce.customization.model_card import (
    adaptation_facts,
    scores_facts,
    share_of_votes,
    similarity_fact,
    write_choice,
    write_with_card,
)
from moce.customization.related_images import RelatedImages
from moce.customization.selection import Choice, route_name
from moce.data.dataset import ImageDataset
from moce.data.divide import learning_rows, voting_rows
from moce.data.load import chosen_samples, load_images
from moce.data.readers.sample import Sample
from moce.errors import MoceError, counted
from moce.evaluation.evaluator import choose_by_probe
from moce.evaluation.task import load_task
from moce.inference.assign import clustered_images
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import input_channels, input_size
from moce.models.mae import MAE, MAESpec
from moce.runs.assignments import ASSIGNMENTS
from moce.runs.files import write_json
from moce.runs.model import STATE, read_config, write_skipped
from moce.runs.resume import check_unchanged, resumes
from moce.runtime.progress import log
from moce.weights.export import Model, check_format
from moce.weights.from_runs import holds_moce, load_clusters
from moce.weights.resolve import moce_run, refuse_given, start_from

LOWER_LR = 0.5  # of the rate that a run was trained with
BASE_LR = 7.5e-5  # for weights of other libraries: half of MAE's own rate


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
        spec, clusters = bank.spec.mae, bank.clusters
        adaptation = _Adaptation(settings, device, spec, mae, clusters, choice.strategy).run()
    else:
        open_output(settings)
        write_skipped(settings.out, skipped, log)
    model = Model(bank.encoder_spec, mae.encoder.cpu())
    facts = [] if adaptation is None else adaptation_facts(adaptation)
    load_it = write_choice(settings.out, settings.format, model, choice, settings.run, facts)
    return _finish(settings, CustomizeResult(settings.out, choice, load_it, adaptation))


def _from_mae(settings: CustomizeSettings, device: torch.device) -> CustomizeResult:
    if settings.data is not None and settings.clusters is None:
        raise MoceError("--data needs --clusters RUN (of moce cluster), to find related images")
    spec, mae = start_from(settings.run, settings)
    check_format(settings.format, Model(spec.encoder, mae.encoder))
    clusters = None if settings.clusters is None else load_clusters(settings.clusters)
    adaptation = _Adaptation(settings, device, spec, mae, clusters).run()
    title = f"Backbone adapted by moce from {settings.run.name}"
    facts = [f"source: {settings.run.name}", *adaptation_facts(adaptation)]
    model = Model(spec.encoder, mae.encoder.cpu())
    load_it = write_with_card(settings.out, settings.format, model, title, facts)
    return _finish(settings, CustomizeResult(settings.out, None, load_it, adaptation))


def _finish(settings: CustomizeSettings, result: CustomizeResult) -> CustomizeResult:
    if result.adaptation is not None:
        write_json(settings.out / ADAPTATION, asdict(result.adaptation))
        shutil.rmtree(settings.out / STATE, ignore_errors=True)  # three times the weights
    return result


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
        choose=voting_rows,
    )
    choice = bank.select(
        images, settings.strategy, settings.threshold, settings.assign, settings.batch_size
    )
    return choice, images.skipped


@dataclass
class _Adaptation:
    """An MAE that is adapted to a task; `clusters` find related images of the pool."""

    settings: CustomizeSettings
    device: torch.device
    spec: MAESpec
    mae: MAE
    clusters: ClusterModel | None
    strategy: str | None = None

    def run(self) -> Adaptation:
        settings = self.settings
        task = chosen_samples(settings.images, voting_rows)
        training = self._training_settings(len(task))
        related, unreadable = self._related(task, training) if settings.data else ([], [])
        images = self._load([*task, *related], self.mae.encoder)
        images = replace(images, skipped=images.skipped + unreadable)
        if resumes(training):
            check_unchanged(training)
            if (training.out / ADAPTATION).is_file():
                raise MoceError(f"{training.out} is finished; use --overwrite to adapt again")
        start_run(training, images)
        of_pool = {sample.id for sample in related}
        num_task = sum(name not in of_pool for name in images.ids)
        return adapt(self.spec, self.mae, images, num_task, training, self.device)

    def _related(
        self, task: list[Sample], training: AdaptationSettings
    ) -> tuple[list[Sample], list[tuple[str, str]]]:
        """Images of the pool, as many as the run can see, and those that could not be read."""
        settings, clusters = self.settings, self.clusters
        assert settings.data is not None and clusters is not None and training.steps is not None
        finder = RelatedImages(
            clusters,
            _known_clusters(settings, clusters),
            lambda samples: self._load(samples, clusters.encoder),
            self.device,
            settings.precision,
        )
        count = round(training.steps * training.batch_size * training.pool_share)
        pool = chosen_samples(settings.data, learning_rows)
        return finder.find(task, pool, settings.data, count, settings.seed), finder.skipped

    def _load(self, samples: list[Sample], encoder: VisionTransformer) -> ImageDataset:
        return load_images(
            samples,
            input_size(encoder),
            pixel_file(self.settings),
            channels=input_channels(encoder),
            max_skipped=self.settings.max_skipped,
        )

    def _training_settings(self, num_images: int) -> AdaptationSettings:
        settings = self.settings
        share = settings.pool_share if settings.data else 0.0
        steps = settings.adapt_steps
        if steps == "auto":
            steps = default_steps(num_images, settings.adapt_batch_size, share)
        same = CustomizeSettings.model_fields.keys() & AdaptationSettings.model_fields.keys()
        own = {"strategy", "batch_size", "pool_share"}  # of the same name, but another meaning
        return AdaptationSettings(
            **{name: getattr(settings, name) for name in same - own},
            choice=self.strategy,
            pool_share=share,
            steps=steps,
            batch_size=settings.adapt_batch_size,
            base_lr=settings.adapt_lr or _base_lr(settings.run),
            log_every=max(1, steps // CHECKS),
            save_every=max(1, steps // CHECKS),
        )


def _base_lr(run: Path) -> float:
    """Half of the rate that a run was trained with, since training continues from its end."""
    folder = moce_run(run)
    known = read_config(folder).get("base_lr") if folder is not None else None
    return LOWER_LR * float(known) if known else BASE_LR


def _known_clusters(settings: CustomizeSettings, clusters: ClusterModel) -> dict[str, int]:
    """The clusters of the pool's images by id, as far as a clustering on disk has them.

    That of a MoCE run may have moved, or another may have taken its place: then none is known.
    """
    assert settings.data is not None
    run = settings.clusters
    if run is None:
        origin = read_config(settings.run).get("clusters")
        run = Path(origin) if origin else None
        if run is None or not (run / ASSIGNMENTS).is_file():
            return {}
    if not torch.equal(load_clusters(run).centroids, clusters.centroids):
        if settings.clusters is not None:
            raise MoceError(f"{run} is not the clustering that {settings.run} was trained with")
        log(f"{run} is no longer the clustering of {settings.run}: it is not used")
        return {}
    return clustered_images(run, clusters.num_clusters, settings.data)
