"""moce finetune: train a backbone end to end on a labeled task."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from moce.commands.setup import hint_few_steps, pixel_file, refuse_unused, resolve, start_run
from moce.config import FinetuneSettings
from moce.config.dense import Task as TaskName
from moce.customization.model_card import fine_tuning_facts, write_with_card
from moce.data.dataset import ImageDataset
from moce.errors import MoceError, NotFinite, counted
from moce.evaluation.finetune import (
    FinetuneObjective,
    build_classifier,
    by_size,
    hold_out,
    predict_scores,
)
from moce.evaluation.metrics import choose_metric, confusion_counts, score
from moce.evaluation.rand_augment import read_policy
from moce.evaluation.results import make_row, write_rows
from moce.evaluation.task import Task, draw_labels, load_task
from moce.evaluation.validation import Validation
from moce.models.encoder import fit_of, input_shape
from moce.runs.files import write_json
from moce.runs.model import STATE, write_model
from moce.runs.resume import recorded_settings, resumes
from moce.runtime.distributed import run_on_rank0
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log
from moce.training.freeze import blocks_to_freeze
from moce.training.lora import ADAPTER, add_lora, check_lora, merge, write_adapter
from moce.training.trainer import fit, total_steps
from moce.weights.export import Model
from moce.weights.from_runs import Backbone, load_backbone


@dataclass
class FinetuneResult:
    """run: the folder; value: the metric on the test images, 0..1; labels: images trained on.

    timm loads a classifier as local-dir:RUN; a detector or segmenter has a network.py beside it.
    """

    run: Path
    metric: str
    value: float
    labels: int

    def summary(self) -> str:
        return f"{self.metric} {100 * self.value:.1f} % from {counted(self.labels, 'label')}: {self.run}"


def run(settings: FinetuneSettings) -> FinetuneResult:
    kind = settings.task or run_on_rank0(partial(_task_of, settings))
    settings = settings.model_copy(update={"task": kind})
    if kind != "classify":
        return _finetune_dense(settings)
    settings, device = resolve(settings)
    if not (settings.lr_grid or settings.keep_best):
        refuse_unused(settings, ["val_share"], "only --lr-grid and --keep-best use it")
    backbone = load_backbone(settings.backbone)
    blocks_to_freeze(backbone.vit, settings.freeze)  # refuses before anything is written
    if settings.lora:
        _check_lora(settings, backbone)
    settings = by_size(settings, backbone.vit)
    shape = input_shape(backbone.vit)
    settings = _without_policy_if_unusable(settings, shape[0])
    # Called here to refuse a wrong policy before anything is written.
    read_policy(settings.rand_augment, backbone.spec, shape[1:])
    task = load_task(
        settings.data, shape, pixel_file(settings), settings.max_skipped, fit_of(backbone.vit)
    )
    metric = choose_metric(settings.metric, task)
    if task.multi_label:
        reason = f"images of {settings.data} may have several classes each, which are not balanced"
        refuse_unused(settings, ["class_weights", "sampling"], reason)
    rows = draw_labels(task.train_labels, settings.num_labels, settings.seed, settings.draw)
    if settings.keep_best and "log_every" not in settings.model_fields_set:
        epoch = math.ceil((1 - settings.val_share) * len(rows) / settings.batch_size)
        settings = settings.model_copy(update={"log_every": epoch})
    start_run(settings, task.train, task.test)
    hint_few_steps(settings, total_steps(settings, len(rows)), "see recipes/finetune_small.yaml")
    tuner = _Tuner(backbone, task, metric, device)
    tried = tuner.search(settings, rows) if settings.lr_grid else []
    if tried:
        settings = settings.model_copy(update={"base_lr": _best_rate(tried)})
        log(
            f"base_lr {settings.base_lr:g} is the best: training on all {counted(len(rows), 'label')} with it"
        )
    tuned = tuner.train(settings, rows)
    vit, best = tuned.vit, tuned.best
    if tuned.adapted is not None:
        if is_rank0():
            name = Path(settings.backbone).name
            write_adapter(settings.out / ADAPTER, tuned.adapted, name)
        merge(tuned.adapted)
    scores = tuner.scores(vit, task.test, settings)
    value = score(metric, scores, task.test_labels)
    row = make_row(
        task=settings.data,
        data=settings.data,
        backbone=settings.backbone,
        reference=settings.backbone,
        protocol="finetune",
        metric=metric,
        labels=len(rows),
        values=[value],
        confusion=confusion_counts([scores], task),
        draw=settings.draw,
        classes=task.classes,
        lr_grid=tried,
    )
    if best is not None:
        row["val"] = best
    _write(settings.out, vit.cpu(), backbone, row, task.multi_label)
    return FinetuneResult(settings.out, metric, value, len(rows))


def _task_of(settings: FinetuneSettings) -> TaskName | None:
    """What the labels say, or what a resumed run was started for."""
    from moce.dense.readers import task_of

    if resumes(settings):
        return recorded_settings(settings).task
    return task_of(settings.data, settings.annotations)


def _finetune_dense(settings: FinetuneSettings) -> FinetuneResult:
    from moce.commands import finetune_dense  # its libraries take seconds to import

    row = finetune_dense.run(settings)
    return FinetuneResult(settings.out, row["metric"], row["values"][0], row["labels"])


def _best_rate(tried: list[dict[str, float]]) -> float:
    best = max(tried, key=lambda member: member["score"])
    if best["score"] == 0:
        raise MoceError("no rate of lr_grid learns anything; give lower ones (--overwrite)")
    return best["base_lr"]


def _without_policy_if_unusable(settings: FinetuneSettings, channels: int) -> FinetuneSettings:
    """Leave out RandAugment for images that are not RGB; raise MoceError if it was set explicitly."""
    if channels == 3 or not settings.rand_augment:
        return settings
    if "rand_augment" in settings.model_fields_set and not settings.resume:
        raise MoceError(
            f"rand_augment works on images of 3 channels, not {channels}; add --rand-augment ''"
        )
    log(f"images of {channels} channels: RandAugment is left out")
    return settings.model_copy(update={"rand_augment": ""})


def _check_lora(settings: FinetuneSettings, backbone: Backbone) -> None:
    """Raise MoceError, before anything is written, if adapters do not fit."""
    refuse_unused(settings, ["freeze"], "--lora freezes the whole backbone")
    if not backbone.dense:
        raise MoceError(f"--lora: {settings.backbone} has token-routed experts, not one dense ViT")
    check_lora(settings, backbone.vit)


@dataclass
class _Tuned:
    """A trained classifier, its best score if it is validated, and its adapters if it has some."""

    vit: VisionTransformer
    best: float | None
    adapted: Any


@dataclass
class _Tuner:
    """Fine-tunes one backbone on images of one task."""

    backbone: Backbone
    task: Task
    metric: str
    device: torch.device

    def train(self, settings: FinetuneSettings, rows: np.ndarray) -> _Tuned:
        """A classifier trained on these training images; its run goes to `settings.out`."""
        torch.manual_seed(settings.seed)  # the new head is the same, whatever ran before
        classes = len(self.task.classes)
        vit = build_classifier(self.backbone, classes, settings.drop_path)
        adapted = add_lora(vit, settings) if settings.lora else None
        held = np.array([], np.int64)
        if settings.keep_best:
            labels = self.task.train_labels[rows]
            rows, held = (
                rows[part] for part in hold_out(labels, settings.val_share, settings.seed)
            )
            log(
                f"training on {counted(len(rows), 'image')}; {len(held)} held out choose the best weights"
            )
        images, labels = self.task.train.subset(rows.tolist()), self.task.train_labels[rows]
        objective = FinetuneObjective(vit, self.backbone.spec, images, labels, settings)
        if not len(held):
            fit(objective, settings, self.device, settings.precision)
            return _Tuned(vit, None, adapted)
        validation = Validation(
            objective,
            self.backbone.spec,
            self.task.train.subset(held.tolist()),
            self.task.train_labels[held],
            self.metric,
            settings,
            self.device,
        )
        objective.diagnostics = validation
        fit(objective, settings, self.device, settings.precision)
        best = validation.restore_best(vit)
        log(f"{self.metric} {100 * best:.1f} % on the held-out images: these weights are kept")
        return _Tuned(vit, best, adapted)

    def scores(
        self, vit: VisionTransformer, images: ImageDataset, settings: FinetuneSettings
    ) -> np.ndarray:
        return predict_scores(vit, self.backbone.spec, images, self.device, settings.precision)

    def search(self, settings: FinetuneSettings, rows: np.ndarray) -> list[dict[str, float]]:
        """Score every rate of `lr_grid` on held-out training images; test images stay unseen.

        Each rate is a run of its own in state/; finished ones are not repeated.
        """
        labels = self.task.train_labels[rows]
        kept, held = (rows[part] for part in hold_out(labels, settings.val_share, settings.seed))
        tried = []
        for rate in settings.lr_grid:
            folder = settings.out / STATE / f"lr_{rate:g}"
            result = folder / "results.json"
            if not run_on_rank0(result.is_file):
                if is_rank0():
                    folder.mkdir(parents=True, exist_ok=True)
                update = {"base_lr": rate, "out": folder, "resume": True, "keep_best": False}
                member = settings.model_copy(update=update)
                value = self._held_out(member, kept, held)
                write_json(result, {"base_lr": rate, "score": value})
                if is_rank0():
                    shutil.rmtree(folder / STATE, ignore_errors=True)
            tried.append(json.loads(run_on_rank0(partial(result.read_text, encoding="utf-8"))))
            log(f"base_lr {rate:g}: {self.metric} {100 * tried[-1]['score']:.1f} % held out")
        return tried

    def _held_out(self, settings: FinetuneSettings, kept: np.ndarray, held: np.ndarray) -> float:
        """The metric on the held-out images; 0, the worst, if training overflows."""
        try:
            vit = self.train(settings, kept).vit
        except NotFinite:
            log(f"base_lr {settings.base_lr:g}: the loss is not finite")
            return 0.0
        scores = self.scores(vit, self.task.train.subset(held.tolist()), settings)
        return score(self.metric, scores, self.task.train_labels[held])


def _write(
    folder: Path, vit: VisionTransformer, backbone: Backbone, row: dict[str, Any], multi_label: bool
) -> None:
    """Write the timm folder, its card, rows.jsonl and, last, model.json, which marks the run as finished.

    timm cannot load a ViT with token-routed experts, so no timm folder is written for one.
    """
    write_rows(folder, [row])
    if backbone.dense and is_rank0():
        model = Model(backbone.spec, vit, classes=row["classes"], multi_label=multi_label)
        facts = [f"source: {Path(row['reference']).name}", *fine_tuning_facts(model, row)]
        write_with_card(folder, "timm", model, "Classifier fine-tuned by moce", facts)
    info = {
        "spec": backbone.spec.to_dict(),
        "metrics": {row["metric"]: row["values"][0]},
        "labels": row["labels"],
        "classes": row["classes"],
        "multi_label": multi_label,
    }
    write_model(folder, "classifier", vit.state_dict(), info)
