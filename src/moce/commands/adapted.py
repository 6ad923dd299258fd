"""The adapted backbones of an evaluation: made once for each task, kept in its folder, resumed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from moce.commands.setup import read_images, refuse_unused, start_run
from moce.config import AdaptationSettings, EvaluateSettings
from moce.customization.adaptation import ADAPTATION
from moce.customization.adapter import Adapter, with_steps
from moce.customization.bank import Bank
from moce.customization.model_card import write_backbone
from moce.customization.related_images import RelatedImages, known_clusters
from moce.customization.selection import Choice
from moce.data.readers.factory import open_source
from moce.errors import MoceError
from moce.evaluation.backbones import Candidate, MaskedAutoencoder, Opened
from moce.evaluation.suite import SuiteTask
from moce.evaluation.task import Task
from moce.models.cluster_model import ClusterModel
from moce.models.mae import MAE, MAESpec
from moce.runs.model import CONFIG
from moce.runtime.distributed import run_on_rank0
from moce.training.defaults import default_lr
from moce.weights.export import Model
from moce.weights.from_runs import load_clusters

FOLDER = "adapted"  # in the evaluation's own: adapted/NAME/TASK
Adaptable = Bank | MaskedAutoencoder


class AdaptedBackbones:
    """Adapts backbones to tasks by the settings of an evaluation; test images are never read."""

    def __init__(self, settings: EvaluateSettings, device: torch.device, precision: str) -> None:
        self.settings, self.device, self.precision = settings, device, precision
        self.load = partial(read_images, settings, keep_tiny=True)
        self._related: dict[str, RelatedImages] = {}  # by reference: tasks share a pool

    def folder(self, plan: SuiteTask, task: Task, candidate: Candidate, model: Adaptable) -> Path:
        """The folder with a candidate's backbone for a task; it is adapted now if it is not there.

        Raises MoceError if its adaptation started with other settings.
        """
        out = self.settings.out / FOLDER / candidate.name / plan.name
        done, resume = run_on_rank0(partial(_state, out))
        if done:
            return out
        spec, mae, choice = _before(candidate, model, task)
        own = set(task.train.ids)
        images = [sample for sample in open_source(plan.data) if sample.id in own]
        settings = self._training_settings(plan, candidate, out, choice, resume)
        settings = with_steps(settings, self.settings.adapt_steps, len(images))
        adapter = Adapter(self._related_images(candidate, model), self.load, start_run, self.device)
        adaptation = adapter.run(images, spec, mae, settings)
        vit = Model(spec.encoder, mae.encoder.cpu())
        reference = Path(candidate.reference)
        run_on_rank0(lambda: write_backbone(out, "timm", vit, reference, choice, adaptation))
        return out

    def _training_settings(
        self, plan: SuiteTask, candidate: Candidate, out: Path, choice: Choice | None, resume: bool
    ) -> AdaptationSettings:
        settings = self.settings
        reference = Path(candidate.reference)
        return AdaptationSettings(
            run=reference,
            choice=None if choice is None else choice.strategy,
            images=plan.data,
            data=settings.adapt_data,
            clusters=settings.adapt_clusters,
            pool_share=settings.adapt_pool_share if settings.adapt_data else 0.0,
            batch_size=settings.adapt_batch_size,
            base_lr=settings.adapt_lr or default_lr(reference),
            out=out,
            resume=resume,
            seed=settings.seed,
            device=self.device.type,
            precision=self.precision,
            threads=settings.threads,
            max_skipped=settings.max_skipped,
        )

    def _related_images(self, candidate: Candidate, model: Adaptable) -> RelatedImages | None:
        """Of the pool, for this backbone; None without a pool."""
        pool, given, reference = (
            self.settings.adapt_data,
            self.settings.adapt_clusters,
            candidate.reference,
        )
        if pool is None:
            return None
        if reference not in self._related:
            mixture = Path(reference) if isinstance(model, Bank) else None
            clusters = model.clusters if isinstance(model, Bank) else _given_clusters(given)
            known = known_clusters(pool, clusters, given, mixture)
            self._related[reference] = RelatedImages(
                pool, clusters, known, self.load, self.device, self.precision
            )
        return self._related[reference]


def check_adaptation(
    settings: EvaluateSettings, asked: EvaluateSettings, models: Mapping[Candidate, Opened]
) -> None:
    """Raise MoceError if nothing is adapted but settings of it are given, or clusters are missing."""
    adapted = {c: model for c, model in models.items() if c.adapts}
    if not adapted:
        names = [name for name in type(asked).model_fields if name.startswith("adapt_")]
        refuse_unused(asked, names, "no backbone is adapted (NAME=REFERENCE@adapt)")
    dense = [c.name for c, model in adapted.items() if not isinstance(model, Bank)]
    if dense and settings.adapt_data is not None and settings.adapt_clusters is None:
        raise MoceError(
            f"--adapt-data needs --adapt-clusters RUN (of moce cluster), to find images for {dense[0]}"
        )


def can_resume(out: Path) -> bool:
    """Whether a folder has a run to resume; it is removed if the run had not written its settings yet."""
    started = (out / CONFIG).is_file()
    if out.is_dir() and not started:
        shutil.rmtree(out)
    return started


def _state(out: Path) -> tuple[bool, bool]:
    """Whether an adaptation is finished, and whether it can be resumed."""
    done = (out / ADAPTATION).is_file()
    return done, not done and can_resume(out)


def _before(
    candidate: Candidate, model: Adaptable, task: Task
) -> tuple[MAESpec, MAE, Choice | None]:
    """What the adaptation to a task starts from."""
    if isinstance(model, MaskedAutoencoder):
        return model.spec, copy.deepcopy(model.mae), None
    choice = model.select(task.train, candidate.strategy or "auto")
    return model.spec.mae, model.mae(choice), choice


def _given_clusters(run: Path | None) -> ClusterModel:
    assert run is not None  # see check_adaptation
    return load_clusters(run)
