"""moce demo: every stage on the embedded images, then MAE, MAE+ and MoCE compared on unlike tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moce.commands import cluster, finetune, pretrain, report, train
from moce.commands.setup import open_output, prepare
from moce.config import (
    ClusterSettings,
    DemoSettings,
    FinetuneSettings,
    PretrainSettings,
    ReportSettings,
    TrainSettings,
)
from moce.customization.bank import Bank, load
from moce.customization.model_card import write_choice
from moce.data.readers.parquet import demo_tasks
from moce.errors import MoceError, raise_if_corrupt
from moce.evaluation.evaluator import Comparison, compare_probes
from moce.evaluation.task import load_task
from moce.reporting.results_table import results_table
from moce.runs.files import write_json
from moce.runs.model import provenance
from moce.runtime.progress import log
from moce.weights.export import Model
from moce.weights.from_runs import load_backbone

IMAGES = "demo:pretrain"
DONE = "demo.json"  # written last: what made the folder
# A ViT small enough to learn something in two minutes on two cores.
ENCODER: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
# The same for all channels: gray images, half of the pool, then stay gray.
GRAY: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
DECODER: dict[str, Any] = {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4}
TRAINING: dict[str, Any] = {"batch_size": 64, "save_every": 1000}


@dataclass
class DemoResult:
    """run: the folder; results: what results.json holds; report: the page."""

    run: Path
    results: dict[str, Any]
    report: Path

    def summary(self) -> str:
        total = sum(self.results["seconds"].values())
        return (
            f"{results_table(self.results)}\n\n"
            f"{total:.0f} s in all. Results: {self.run / 'results.json'}; "
            f"pictures: {self.report}"
        )


def run(settings: DemoSettings) -> DemoResult:
    tasks = _tasks(settings.tasks)
    if settings.reuse:
        if _is_done(settings):
            with raise_if_corrupt(settings.out / "results.json"):
                results = json.loads((settings.out / "results.json").read_text(encoding="utf-8"))
            return DemoResult(settings.out, results, settings.out / "report.html")
        settings = settings.model_copy(update={"overwrite": True})
    device, precision = prepare(settings)
    open_output(settings)
    runtime = {"device": device.type, "precision": precision}
    demo = _Demo(settings, runtime | {"seed": settings.seed, "threads": settings.threads})
    demo.train()
    demo.compare(tasks, device)
    results = {
        "rows": [row for task in demo.comparisons for row in task.rows],
        "selection": {task.task: task.choice.to_json() for task in demo.comparisons},
        "seconds": demo.seconds,
    }
    write_json(settings.out / "results.json", results)
    page = settings.out / "report.html"
    with demo.timed("report"):
        report.run(ReportSettings(runs=(settings.out,), out=page))
    write_json(settings.out / "results.json", results)
    write_json(settings.out / DONE, _origin(settings))
    return DemoResult(settings.out, results, page)


def _is_done(settings: DemoSettings) -> bool:
    """Whether the folder holds a whole demo of these settings and this version."""
    path = settings.out / DONE
    with raise_if_corrupt(path):
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == _origin(settings)


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
    comparisons: list[Comparison] = field(default_factory=list)

    @contextmanager
    def timed(self, objective: str) -> Iterator[None]:
        """Announce a stage, and add its time to `seconds`."""
        log(f"— {objective}")
        start = time.perf_counter()
        yield
        self.seconds[objective] = round(time.perf_counter() - start, 1)

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

    def compare(self, tasks: list[str], device: torch.device) -> None:
        """Probes and fine-tuning on every task."""
        out = self.settings.out
        bank = load(out / "moce")
        bank.device, bank.precision = device, self.runtime["precision"]
        dense = {name: load_backbone(str(out / name)) for name in ("mae", "mae_plus")}
        with self.timed("probes"):
            for name in tasks:
                task = load_task(f"demo:{name}", (3, 32, 32))
                self.comparisons.append(
                    compare_probes(
                        name,
                        task,
                        dense,
                        bank,
                        self.settings.num_labels,
                        self.settings.draws,
                        self.settings.seed,
                    )
                )
        with self.timed("finetune"):
            for comparison in self.comparisons:
                backbone = self._export(bank, comparison)
                self._finetune(comparison, "mae_plus", out / "mae_plus")
                self._finetune(comparison, "moce", backbone)

    def _export(self, bank: Bank, comparison: Comparison) -> Path:
        folder = self.settings.out / "backbones" / comparison.task
        folder.mkdir(parents=True)
        model = Model(bank.encoder_spec, bank.backbone(comparison.choice))
        write_choice(folder, "timm", model, comparison.choice, self.settings.out / "moce")
        return folder

    def _finetune(self, comparison: Comparison, method: str, backbone: Path) -> None:
        result = finetune.run(
            FinetuneSettings(
                backbone=str(backbone),
                data=f"demo:{comparison.task}",
                out=self.settings.out / "finetune" / f"{comparison.task}_{method}",
                num_labels=self.settings.num_labels,
                epochs=self.settings.finetune_epochs,
                batch_size=32,
                base_lr=2.4e-2,
                crop_scale=0.7,
                hflip=False,
                rand_augment="",
                random_erasing=0,
                mixup=0,
                cutmix=0,
                layer_decay=0.9,
                drop_path=0.1,
                warmup=0.1,
                **self.runtime,
            )
        )
        comparison.add(method, "finetune", [result.value])
