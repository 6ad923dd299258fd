"""moce demo: pretrain, cluster, train, evaluate and report on the embedded images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from moce.commands import cluster, evaluate, finetune, pretrain, report, train
from moce.commands.setup import open_output, prepare, refuse_unused
from moce.config import (
    ClusterSettings,
    DemoSettings,
    EvaluateSettings,
    FinetuneSettings,
    PretrainSettings,
    ReportSettings,
    TrainSettings,
)
from moce.data.readers.parquet import demo_tasks
from moce.errors import MoceError, raise_if_corrupt
from moce.evaluation.results import ROWS, read_rows
from moce.reporting.results_table import results_table
from moce.runs.files import write_json, write_text
from moce.runs.model import provenance
from moce.runtime.progress import log

Step = Callable[[], object]
IMAGES = "demo:pretrain"
DONE = "demo.json"  # written last: settings, versions, and the seconds of every step
# A ViT small enough to learn something in two minutes on two cores. Mean and deviation are the same for
# all channels, so that gray images, half of the pool, stay gray.
ENCODER: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
MAE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": ENCODER,
    "img_size": 32,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 4,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "base_lr": 6e-3,
}
TRAINING: dict[str, Any] = {"batch_size": 64, "save_every": 1000}
FINETUNE: dict[str, Any] = {
    "batch_size": 32,
    "base_lr": 2.4e-2,
    "crop_scale": 0.7,
    "hflip": False,
    "rand_augment": "",
    "random_erasing": 0,
    "mixup": 0,
    "cutmix": 0,
    "layer_decay": 0.9,
    "drop_path": 0.1,
    "warmup": 0.1,
}
# As recipes/segment_small.yaml, in half the steps.
SEGMENT: dict[str, Any] = {
    "task": "segment",
    "image_size": 64,
    "jitter": (0.8, 1.25),
    "steps": 400,
    "batch_size": 16,
    "base_lr": 4.8e-2,
    "layer_decay": 0.9,
    "drop_path": 0.0,
    "warmup": 0.1,
    "head_args": {"kind": "linear"},
}
DENSE_EPOCHS = 6.0  # of the MAE
NOT_DENSE = (
    *("tasks", "pretrain_epochs", "train_epochs", "num_clusters", "num_experts"),
    *("num_labels", "draws", "adapt_steps", "finetune_epochs"),
)


@dataclass
class DemoResult:
    """run: the folder; rows: as in rows.jsonl of `results`; seconds: by step; report: the page."""

    run: Path
    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    report: Path
    results: Path

    def summary(self) -> str:
        return (
            f"{results_table(self.rows)}\n\n{sum(self.seconds.values()):.0f} s in total. "
            f"Rows: {self.results / ROWS}; pictures: {self.report}"
        )


def run(settings: DemoSettings) -> DemoResult:
    tasks = _tasks(settings.tasks)
    if settings.dense:
        refuse_unused(settings, NOT_DENSE, "--dense has no experts and one task")
    if settings.reuse:
        if (seconds := _seconds_if_done(settings)) is not None:
            return _result(settings, seconds)
        settings = settings.model_copy(update={"overwrite": True})
    device, precision = prepare(settings)
    open_output(settings)
    runtime: dict[str, Any] = {
        "device": device.type,
        "precision": precision,
        "seed": settings.seed,
        "threads": settings.threads,
    }
    if settings.dense:
        steps = _segmentation(settings, runtime)
    else:
        steps = _training(settings, runtime) | _evaluation(settings, tasks, runtime)
    page = ReportSettings(runs=(settings.out,), out=settings.out / "report.html")
    steps["report"] = partial(report.run, page)
    seconds = {}
    for name, step in steps.items():
        log(f"— {name}")
        start = time.perf_counter()
        step()
        seconds[name] = round(time.perf_counter() - start, 1)
    write_json(settings.out / DONE, {**_origin(settings), "seconds": seconds})
    return _result(settings, seconds)


def _result(settings: DemoSettings, seconds: dict[str, float]) -> DemoResult:
    out = settings.out
    results = out / ("segmenter" if settings.dense else "evaluation")
    return DemoResult(out, read_rows(results), seconds, out / "report.html", results)


def _seconds_if_done(settings: DemoSettings) -> dict[str, float] | None:
    """The seconds of a finished demo with these settings and this version; None if there is none."""
    path = settings.out / DONE
    if not path.is_file():
        return None
    with raise_if_corrupt(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        seconds = content.pop("seconds", None)
    return seconds if content == _origin(settings) else None


def _origin(settings: DemoSettings) -> dict[str, Any]:
    values = settings.model_dump(mode="json", exclude={"out", "overwrite", "reuse", "threads"})
    return {"settings": values, **provenance()}


def _tasks(wanted: tuple[str, ...]) -> list[str]:
    known = demo_tasks()
    unknown = [task for task in wanted if task not in known]
    if unknown:
        raise MoceError(f"no embedded task '{unknown[0]}' (valid: {', '.join(known)})")
    return list(wanted) or known


def _training(settings: DemoSettings, runtime: dict[str, Any]) -> dict[str, Step]:
    """MAE, clusters, then MoCE and MAE+ with equal steps and data."""
    out = settings.out
    mae = PretrainSettings(
        data=IMAGES, out=out / "mae", epochs=settings.pretrain_epochs, **MAE, **TRAINING, **runtime
    )
    clusters = ClusterSettings(
        data=IMAGES,
        mae=out / "mae",
        out=out / "clusters",
        num_clusters=settings.num_clusters,
        **runtime,
    )
    further = {
        "data": IMAGES,
        "mae": out / "mae",
        "epochs": settings.train_epochs,
        "base_lr": 3e-3,
        **TRAINING,
        **runtime,
    }
    experts = {"clusters": out / "clusters", "num_experts": settings.num_experts}
    moce = TrainSettings(out=out / "moce", **experts, **further)
    mae_plus = TrainSettings(out=out / "mae_plus", method="mae", **further)
    return {
        "mae": partial(pretrain.run, mae),
        "clusters": partial(cluster.run, clusters),
        "moce": partial(train.run, moce),
        "mae_plus": partial(train.run, mae_plus),
    }


def _segmentation(settings: DemoSettings, runtime: dict[str, Any]) -> dict[str, Step]:
    """An MAE, composed images with masks, and a segmenter."""
    from moce.dense.composed import write_scenes  # its libraries take seconds to import

    out = settings.out
    mae = PretrainSettings(
        data=IMAGES, out=out / "mae", epochs=DENSE_EPOCHS, **MAE, **TRAINING, **runtime
    )
    tuning = FinetuneSettings(
        backbone=str(out / "mae"),
        data=str(out / "scenes"),
        out=out / "segmenter",
        **SEGMENT,
        **runtime,
    )
    return {
        "mae": partial(pretrain.run, mae),
        "scenes": partial(write_scenes, out / "scenes", "kinds", seed=settings.seed),
        "segmenter": partial(finetune.run, tuning),
    }


def _evaluation(
    settings: DemoSettings, tasks: list[str], runtime: dict[str, Any]
) -> dict[str, Step]:
    """Probe all backbones on every task, also adapted to it, then fine-tune MAE+ and MoCE."""
    out = settings.out
    runs = {name: f"{name}={out / name}" for name in ("mae", "mae_plus", "moce")}
    routes = (f"{name}={out / 'moce'}@{name}" for name in ("random", "best_strategy"))
    adapted = (
        f"mae_plus_adapted={out / 'mae_plus'}@adapt",
        f"moce_adapted={out / 'moce'}@auto+adapt",
    )
    common = {
        "suite": _write_suite(out / "suite.yaml", tasks, settings),
        "out": out / "evaluation",
        "finetune_draws": settings.draws,
        **runtime,
    }
    adaptation = {
        "adapt_steps": settings.adapt_steps,
        "adapt_data": IMAGES,
        "adapt_clusters": out / "clusters",
        "adapt_batch_size": TRAINING["batch_size"],
    }
    probes = EvaluateSettings(
        backbones=(*runs.values(), *routes, *adapted), protocols=("linear",), **adaptation, **common
    )
    finetune = EvaluateSettings(
        backbones=(runs["mae_plus"], runs["moce"]),
        protocols=("finetune",),
        resume=True,  # its rows go with those of the probes
        **common,
    )
    return {
        "probes": partial(evaluate.run, probes),
        "finetune": partial(evaluate.run, finetune),
    }


def _write_suite(path: Path, tasks: list[str], settings: DemoSettings) -> Path:
    """The demo's tasks as `moce evaluate` reads them."""
    suite = {
        "name": "demo",
        "draws": settings.draws,
        "labels": settings.num_labels,
        "probe": {"solver": "lbfgs"},
        "finetune": {**FINETUNE, "epochs": settings.finetune_epochs},
        "tasks": [{"name": task, "data": f"demo:{task}"} for task in tasks],
    }
    write_text(path, yaml.safe_dump(suite, sort_keys=False))
    return path
