"""moce: one masked-autoencoder pre-training, a vision backbone for every task.

    moce.pretrain("photos/", out="runs/mae")
    moce.cluster("photos/", mae="runs/mae", out="runs/clusters", num_clusters=64)
    moce.train("photos/", mae="runs/mae", clusters="runs/clusters", out="runs/moce")
    vit = moce.load("runs/moce").customize("task_images/")

Every verb takes the settings of its class in `moce.config` as keyword arguments and returns a
small result. Importing moce is light: torch is imported when a verb is first called.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moce.errors import MoceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moce.commands.cluster import ClusterResult
    from moce.commands.convert import ConvertResult
    from moce.commands.customize import CustomizeResult
    from moce.commands.demo import DemoResult
    from moce.commands.doctor import DoctorResult
    from moce.commands.embed import EmbedResult
    from moce.commands.evaluate import EvaluateResult
    from moce.commands.export import ExportResult
    from moce.commands.finetune import FinetuneResult
    from moce.commands.headroom import HeadroomResult
    from moce.commands.pack import PackResult
    from moce.commands.pretrain import PretrainResult
    from moce.commands.probe import ProbeResult
    from moce.commands.report import ReportResult
    from moce.commands.train import TrainResult
    from moce.customization.bank import Bank

    Data = str | Path | Sequence[str | Path]  # a DATA argument, or several sources

__version__ = version("moce")
__all__ = [
    "MoceError",
    "cluster",
    "convert",
    "customize",
    "demo",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "headroom",
    "load",
    "pack",
    "pretrain",
    "probe",
    "report",
    "train",
]


def pack(data: Data, **settings: Any) -> PackResult:
    """Decode images once, into one file; settings: moce.config.PackSettings."""
    return _call("pack", data=data, **settings)


def pretrain(data: Data, **settings: Any) -> PretrainResult:
    """Pre-train a masked autoencoder; settings: moce.config.PretrainSettings."""
    return _call("pretrain", data=data, **settings)


def cluster(data: Data, **settings: Any) -> ClusterResult:
    """Cluster images by an MAE's features; settings: moce.config.ClusterSettings."""
    return _call("cluster", data=data, **settings)


def train(data: Data, **settings: Any) -> TrainResult:
    """Train experts (or MAE+); settings: moce.config.TrainSettings."""
    return _call("train", data=data, **settings)


def headroom(data: Data, **settings: Any) -> HeadroomResult:
    """Estimate what experts could gain; settings: moce.config.HeadroomSettings."""
    return _call("headroom", data=data, **settings)


def customize(run: str | Path, images: Data, **settings: Any) -> CustomizeResult:
    """Write a task's backbone; settings: moce.config.CustomizeSettings."""
    return _call("customize", run=run, images=images, **settings)


def export(run: str | Path, **settings: Any) -> ExportResult:
    """Write a model for another library; settings: moce.config.ExportSettings."""
    return _call("export", run=run, **settings)


def convert(weights: str | Path, **settings: Any) -> ConvertResult:
    """Convert weights to safetensors; settings: moce.config.ConvertSettings."""
    return _call("convert", weights=weights, **settings)


def embed(backbone: str | Path, data: Data, **settings: Any) -> EmbedResult:
    """Write one feature per image; settings: moce.config.EmbedSettings."""
    return _call("embed", backbone=str(backbone), data=data, **settings)


def finetune(backbone: str | Path, data: Data, **settings: Any) -> FinetuneResult:
    """Fine-tune a backbone on a labeled task; settings: moce.config.FinetuneSettings."""
    return _call("finetune", backbone=str(backbone), data=data, **settings)


def probe(backbone: str | Path, data: Data, **settings: Any) -> ProbeResult:
    """Score frozen features on a labeled task; settings: moce.config.ProbeSettings."""
    return _call("probe", backbone=str(backbone), data=data, **settings)


def evaluate(suite: str | Path, **settings: Any) -> EvaluateResult:
    """Compare backbones on a suite of tasks; settings: moce.config.EvaluateSettings."""
    return _call("evaluate", suite=suite, **settings)


def report(*runs: str | Path, **settings: Any) -> ReportResult:
    """Draw runs as one HTML page; settings: moce.config.ReportSettings."""
    return _call("report", runs=runs, **settings)


def demo(**settings: Any) -> DemoResult:
    """Run every stage on the embedded images; settings: moce.config.DemoSettings."""
    return _call("demo", **settings)


def doctor(**settings: Any) -> DoctorResult:
    """Look at versions, devices, precision and disk; settings: moce.config.DoctorSettings."""
    return _call("doctor", **settings)


def load(run: str | Path) -> Bank:
    """Load a `moce train` run, ready to `.select` and `.customize`."""
    from moce.customization.bank import load as load_bank

    return load_bank(run)


def _call(command: str, **values: Any) -> Any:
    from moce.commands.registry import COMMANDS

    return COMMANDS[command].run(values)
