"""moce customize: a dense backbone for a task, from its images (stage 3), adapted to it if asked."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moce.commands.setup import open_output, pixel_file, prepare
from moce.config import CustomizeSettings, TrainingSettings
from moce.config.usage import check_used
from moce.customization.adaptation import ADAPTATION, Adaptation, adapt, default_steps, draw_related
from moce.customization.bank import Bank, load
from moce.customization.model_card import adaptation_facts, write_choice, write_with_card
from moce.customization.selection import Choice, route_name
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.readers.sample import Sample
from moce.errors import MoceError
from moce.evaluation.evaluator import choose_by_probe
from moce.evaluation.task import load_task
from moce.inference.assign import assign
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import input_channels, input_size
from moce.models.mae import MAE, MAESpec
from moce.runs.assignments import ASSIGNMENTS, read_assignments
from moce.runs.files import write_json
from moce.runs.model import CONFIG, STATE, read_config, write_skipped
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
    votes = [f"route {route_name(route)}: {n} images" for route, n in choice.votes.items()]
    return [
        *votes,
        f"strategy {choice.strategy}; the winner has {choice.share:.0%} of the votes",
        f"similarity to the clusters {choice.similarity:.3f} "
        f"(training images: {choice.training_similarity:.3f})",
    ]


def run(settings: CustomizeSettings) -> CustomizeResult:
    check_used(settings, settings)
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
        job = _Adaptation(settings, device, bank.spec.mae, mae, bank.clusters)
        adaptation, skipped = job.run()
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
    adaptation, skipped = _Adaptation(settings, device, spec, mae, clusters).run()
    write_skipped(settings.out, skipped, log)
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

    def run(self) -> tuple[Adaptation, list[tuple[str, str]]]:
        """What was done, and the ids and reasons of images that could not be read."""
        settings = self.settings
        task = [sample for sample in open_source(settings.images) if sample.split != "test"]
        if not task:
            raise MoceError(f"{settings.images} has test images only; adaptation needs others")
        steps = settings.adapt_steps
        if steps == "auto":
            share = settings.pool_share if settings.data else 0.0
            steps = default_steps(len(task), settings.adapt_batch_size, share)
        related = self._related(task, steps) if settings.data else []
        images = self._load([*task, *related])
        unreadable = {name for name, _ in images.skipped}
        num_task = sum(sample.id not in unreadable for sample in task)
        training = self._training_settings(steps)
        open_output(settings)
        done = adapt(
            self.spec, self.mae, images, num_task, settings.pool_share, training, self.device
        )
        return done, images.skipped

    def _related(self, task: list[Sample], steps: int) -> list[Sample]:
        """Images of the pool from the task's clusters, as many as the run can see."""
        settings, clusters = self.settings, self.clusters
        assert settings.data is not None and clusters is not None
        of_task = self._assign(task)
        histogram = torch.tensor(list(of_task.values())).bincount(minlength=clusters.num_clusters)
        pool = open_source(settings.data)
        known = self._known_clusters()
        unseen = [sample for sample in pool if sample.id not in known]
        if unseen:
            log(f"{len(unseen)} images of the pool are new to the clustering; assigning them")
            known |= self._assign(unseen)
        readable = [sample for sample in pool if sample.id in known]
        count = round(steps * settings.adapt_batch_size * settings.pool_share)
        drawn = draw_related(readable, known, histogram.tolist(), count, settings.seed)
        if not drawn:
            raise MoceError(
                f"{settings.data} has no images of the task's clusters; leave out --data"
            )
        return drawn

    def _known_clusters(self) -> dict[str, int]:
        """The clusters of the pool's images by id, as far as a clustering on disk knows them."""
        run = self.settings.clusters
        if run is None:
            origin = read_config(self.settings.run).get("clusters")
            run = Path(origin) if origin else None
        known = run is not None and (run / ASSIGNMENTS).is_file() and (run / CONFIG).is_file()
        return read_assignments(run) if run is not None and known else {}

    def _assign(self, samples: list[Sample]) -> dict[str, int]:
        """The cluster of every image that can be read, by id."""
        assert self.clusters is not None
        encoder = self.clusters.encoder
        images = self._load(samples, input_size(encoder))
        clusters = assign(images, self.clusters, self.device, self.settings.precision)
        return dict(zip(images.ids, clusters.tolist(), strict=True))

    def _load(self, samples: list[Sample], size: tuple[int, int] | None = None) -> ImageDataset:
        encoder = self.mae.encoder
        return load_images(
            samples,
            size or input_size(encoder),
            pixel_file(self.settings),
            channels=input_channels(encoder),
            max_skipped=self.settings.max_skipped,
        )

    def _training_settings(self, steps: int) -> TrainingSettings:
        settings = self.settings
        checks = max(1, steps // 8)
        return TrainingSettings(
            out=settings.out,
            overwrite=settings.overwrite,
            resume=settings.resume,
            steps=steps,
            batch_size=settings.adapt_batch_size,
            base_lr=settings.adapt_lr or self._base_lr(),
            seed=settings.seed,
            device=settings.device,
            precision=settings.precision,
            threads=settings.threads,
            max_skipped=settings.max_skipped,
            log_every=checks,
            save_every=checks,
        )

    def _base_lr(self) -> float:
        """Half of the rate that the run was trained with: it goes on from a trained state."""
        run = moce_run(self.settings.run)
        known = read_config(run).get("base_lr") if run is not None else None
        return LOWER_LR * float(known) if known else BASE_LR
