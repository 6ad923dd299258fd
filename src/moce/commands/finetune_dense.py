"""moce finetune --task detect or segment: a detector or segmenter on a plain ViT."""

from __future__ import annotations

import inspect
import json
from functools import partial
from typing import Any

import numpy as np
import torch

from moce.commands.setup import hint_few_steps, resolve, start_run
from moce.config import FinetuneSettings
from moce.dense import network as network_module
from moce.dense.dataset import DenseImages, split
from moce.dense.examples import write_examples
from moce.dense.predictor import KINDS, Predictor, evaluate
from moce.dense.readers import read_dense
from moce.dense.recipe import by_task, network_config, new_network
from moce.dense.training import DenseObjective
from moce.dense.types import DenseSource, DenseTask, Instances
from moce.errors import MoceError
from moce.evaluation.results import make_row, write_rows
from moce.models.encoder import input_channels
from moce.runs.files import write_text
from moce.runs.model import SKIPPED, write_model
from moce.runtime.distributed import run_on_rank0
from moce.runtime.progress import log
from moce.training.freeze import blocks_to_freeze
from moce.training.micro_batch import settle_micro_batch
from moce.training.trainer import fit, total_steps
from moce.weights.from_runs import load_backbone

METRICS: dict[DenseTask, str] = {"detect": "box_ap", "segment": "miou"}
HEADLINES = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "miou", "pixel_accuracy")
NETWORK = "network.py"  # a copy of the code that builds the network
TEST_BATCH = 8  # images
RECIPES = {"detect": "recipes/detect_small.yaml", "segment": "recipes/segment_small.yaml"}


def run(settings: FinetuneSettings) -> dict[str, Any]:
    """Train and score a detector or segmenter; the row of results. settings: with a task."""
    settings, device = resolve(settings)
    settings = by_task(settings)
    if settings.strategy == "fsdp":
        raise MoceError("detectors and segmenters are not sharded: use --strategy ddp")
    backbone = load_backbone(settings.backbone)
    blocks_to_freeze(backbone.vit, settings.freeze)  # refuses before anything is written
    source = _read(settings)
    config = network_config(backbone, source, settings)
    train, test = split(source, input_channels(backbone.vit))
    train = train.subset(_draw(settings, len(train)))
    _check_test(source, test)
    start_run(settings, train, test)
    _report(settings, source)
    hint_few_steps(settings, total_steps(settings, len(train)), f"see {RECIPES[source.task]}")
    torch.manual_seed(settings.seed)  # the new head is the same, whatever ran before
    network = new_network(config, backbone, settings.drop_path)
    objective = DenseObjective(network, config, train, settings)
    settings = settle_micro_batch(objective, settings, device)
    fit(objective, settings, device, settings.precision)
    predictor = Predictor(network, config, source.classes, device, settings.precision)
    figures = evaluate(predictor, test, TEST_BATCH)
    row = _row(settings, source, figures, len(train))
    _write(settings, predictor, test, row)
    return row


def _read(settings: FinetuneSettings) -> DenseSource:
    task: DenseTask = "detect" if settings.task == "detect" else "segment"
    share, ignored = settings.max_skipped, settings.ignore_index
    return read_dense(settings.data, task, settings.annotations, share, ignored)


def _draw(settings: FinetuneSettings, count: int) -> list[int]:
    """Rows of the training images: all, or a random draw of `num_labels`."""
    if settings.num_labels is None or settings.num_labels >= count:
        return list(range(count))
    order = np.random.default_rng([settings.seed, settings.draw]).permutation(count)
    return sorted(order[: settings.num_labels].tolist())


def _check_test(source: DenseSource, test: DenseImages) -> None:
    """Raise MoceError if there is nothing that the metric could count."""
    if source.task == "segment":
        return
    targets = (sample.target() for sample in test.samples)
    if not any(isinstance(target, Instances) and len(target) for target in targets):
        raise MoceError(f"the test images of {source.name} have no objects to find")


def _report(settings: FinetuneSettings, source: DenseSource) -> None:
    """Log what the source holds, and list what was left out of it."""
    what = "objects with masks" if source.has_masks else "objects"
    what = "masks of classes" if source.task == "segment" else what
    log(f"{source.name}: {len(source.samples)} images with {what}, {len(source.classes)} classes")
    if source.clipped:
        log(f"cut {len(source.clipped)} boxes at the border of their image")
    if source.skipped:
        lines = [json.dumps({"id": name, "reason": why}) + "\n" for name, why in source.skipped]
        write_text(settings.out / SKIPPED, "".join(lines))
        where = settings.out / SKIPPED
        log(f"left out {len(source.skipped)} images and annotations (listed in {where})")


def _row(
    settings: FinetuneSettings, source: DenseSource, figures: dict[str, float], count: int
) -> dict[str, Any]:
    metric = METRICS[source.task]
    return make_row(
        task=settings.data,
        data=settings.data,
        backbone=settings.backbone,
        reference=settings.backbone,
        protocol="finetune",
        metric=metric,
        labels=count,
        values=[figures.get(metric, 0.0)],
        draw=settings.draw,
        classes=source.classes,
        figures=figures,
    )


def _write(
    settings: FinetuneSettings, predictor: Predictor, test: DenseImages, row: dict[str, Any]
) -> None:
    """Write the code of the network, examples, rows.jsonl and, last, weights and model.json."""
    folder = settings.out
    write_text(folder / NETWORK, inspect.getsource(network_module))
    run_on_rank0(partial(write_examples, folder, predictor, test))
    write_rows(folder, [row])
    info = {
        "network": predictor.config,
        "classes": predictor.classes,
        "metrics": {name: row["figures"][name] for name in HEADLINES if name in row["figures"]},
        "labels": row["labels"],
    }
    kind = next(kind for kind, task in KINDS.items() if task == predictor.task)
    write_model(folder, kind, predictor.network.state_dict(), info)
