"""moce demo: pretrain, cluster, train, evaluate and report on the embedded images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moce.commands import cluster, evaluate, pretrain, report, train
from moce.commands.setup import open_output, prepare
from moce.config import (
    ClusterSettings,
    DemoSettings,
    EvaluateSettings,
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

IMAGES = "demo:pretrain"
DONE = "demo.json"  # written last: settings, versions, and the seconds of every step
# A ViT small enough to learn something in two minutes on two cores.
ENCODER: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4}
# The same for all channels, so that gray images, half of the pool, stay gray.
GRAY: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
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


@dataclass
class DemoResult:
    """run: the folder; rows: as in evaluation/rows.jsonl; seconds: by step; report: the page."""

    run: Path
    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    report: Path

    def summary(self) -> str:
        return (
            f"{results_table(self.rows)}\n\n{sum(self.seconds.values()):.0f} s in total. "
            f"Rows: {self.run / 'evaluation' / ROWS}; pictures: {self.report}"
        )


def run(settings: DemoSettings) -> DemoResult:
    tasks = _tasks(settings.tasks)
    if settings.reuse:
        if (seconds := _seconds_if_done(settings)) is not None:
            return _result(settings.out, seconds)
        settings = settings.model_copy(update={"overwrite": True})
    device, precision = prepare(settings)
    open_output(settings)
    runtime = {"device": device.type, "precision": precision}
    demo = _Demo(settings, runtime | {"seed": settings.seed, "threads": settings.threads})
    demo.train()
    demo.evaluate(tasks)
    result = _result(settings.out, demo.seconds)
    with demo.timed("report"):
        report.run(ReportSettings(runs=(settings.out,), out=result.report))
    write_json(settings.out / DONE, {**_origin(settings), "seconds": demo.seconds})
    return result


def _result(out: Path, seconds: dict[str, float]) -> DemoResult:
    return DemoResult(out, read_rows(out / "evaluation"), seconds, out / "report.html")


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


@dataclass
class _Demo:
    settings: DemoSettings
    runtime: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Announce a step, and add its time to `seconds`."""
        log(f"— {step}")
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 1)

    def train(self) -> None:
        """MAE, clusters, then MoCE and MAE+ with equal steps and data."""
        settings, out = self.settings, self.settings.out
        with self.timed("mae"):
            pretrain.run(
                PretrainSettings(
                    data=IMAGES,
                    out=out / "mae",
                    model="vit_tiny_patch16_224",
                    model_args=ENCODER,
                    img_size=32,
                    epochs=settings.pretrain_epochs,
                    base_lr=6e-3,
                    **DECODER,
                    **GRAY,
                    **TRAINING,
                    **self.runtime,
                )
            )
        with self.timed("clusters"):
            cluster.run(
                ClusterSettings(
                    data=IMAGES,
                    mae=out / "mae",
                    out=out / "clusters",
                    num_clusters=settings.num_clusters,
                    **self.runtime,
                )
            )
        experts = {"clusters": out / "clusters", "num_experts": settings.num_experts}
        methods: dict[str, dict[str, Any]] = {"moce": experts, "mae_plus": {"method": "mae"}}
        for name, method in methods.items():
            with self.timed(name):
                train.run(
                    TrainSettings(
                        data=IMAGES,
                        mae=out / "mae",
                        out=out / name,
                        **method,
                        epochs=settings.train_epochs,
                        base_lr=3e-3,
                        **TRAINING,
                        **self.runtime,
                    )
                )

    def evaluate(self, tasks: list[str]) -> None:
        """Probe all backbones on every task, then fine-tune MAE+ and MoCE."""
        out = self.settings.out
        suite = _write_suite(out / "suite.yaml", tasks, self.settings)
        runs = {name: f"{name}={out / name}" for name in ("mae", "mae_plus", "moce")}
        routes = (f"{name}={out / 'moce'}@{name}" for name in ("random", "oracle"))
        steps = {
            "probes": ("linear", (*runs.values(), *routes)),
            "finetune": ("finetune", (runs["mae_plus"], runs["moce"])),
        }
        for step, (protocol, backbones) in steps.items():
            with self.timed(step):
                evaluate.run(
                    EvaluateSettings(
                        suite=suite,
                        backbones=backbones,
                        protocols=(protocol,),
                        out=out / "evaluation",
                        resume=step == "finetune",  # its rows go with those of the probes
                        **self.runtime,
                    )
                )


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
