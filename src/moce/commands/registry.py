"""The verbs: name, settings, positional arguments and an example. The CLI and the functions read it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from moce import config
from moce.config.load import parse
from moce.errors import MoceError
from moce.runs.lock import locks_released
from moce.runtime.launch import launch


@dataclass(frozen=True)
class Command:
    """A verb's work is `run(settings)` in moce/verbs/NAME.py.

    shared: whether several processes can do it together.
    """

    name: str
    settings: type[config.Settings]
    positional: tuple[str, ...]
    example: str
    shared: bool = False

    def run(self, values: dict[str, Any]) -> Any:
        """Validate the values, then import the verb and do its work."""
        settings = parse(self.settings, values)
        if launch().world_size > 1 and not self.shared:
            raise MoceError(
                f"this is work for one process, and {launch().by} has started {launch().world_size}; "
                f"run it without {launch().by}"
            )
        with locks_released():
            return import_module(f"moce.commands.{self.name}").run(settings)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "pack",
            config.PackSettings,
            ("data",),
            "moce pack photos/ --size 256 --out photos.moce",
        ),
        Command(
            "pretrain",
            config.PretrainSettings,
            ("data",),
            "moce pretrain photos/ --out runs/mae --model vit_base_patch16_224 --epochs 400",
            shared=True,
        ),
        Command(
            "cluster",
            config.ClusterSettings,
            ("data",),
            "moce cluster photos/ --mae runs/mae --num-clusters 64 --out runs/clusters",
            shared=True,
        ),
        Command(
            "train",
            config.TrainSettings,
            ("data",),
            "moce train photos/ --mae runs/mae --clusters runs/clusters --num-experts 8 "
            "--out runs/moce",
            shared=True,
        ),
        Command(
            "headroom",
            config.HeadroomSettings,
            ("data",),
            "moce headroom photos/ --mae runs/mae --clusters runs/clusters --out runs/headroom",
        ),
        Command(
            "customize",
            config.CustomizeSettings,
            ("run", "images"),
            "moce customize runs/moce birds/ --out backbones/birds",
        ),
        Command(
            "export",
            config.ExportSettings,
            ("run",),
            "moce export runs/moce --route 2-0 --format transformers --out backbones/route",
        ),
        Command(
            "convert",
            config.ConvertSettings,
            ("weights",),
            "moce convert mae_pretrain_vit_base.pth --out mae_base.safetensors",
        ),
        Command(
            "embed",
            config.EmbedSettings,
            ("backbone", "data"),
            "moce embed backbones/birds birds/ --out birds.parquet",
        ),
        Command(
            "finetune",
            config.FinetuneSettings,
            ("backbone", "data"),
            "moce finetune backbones/birds birds/ --out runs/birds --epochs 100",
            shared=True,
        ),
        Command(
            "probe",
            config.ProbeSettings,
            ("backbone", "data"),
            "moce probe backbones/birds birds/ --kind linear --draws 3 --num-labels 200",
        ),
        Command(
            "evaluate",
            config.EvaluateSettings,
            ("suite",),
            "moce evaluate recipes/suites/paper11.yaml --out runs/eval "
            "--backbones mae+=runs/mae_plus,moce=runs/moce",
        ),
        Command(
            "report",
            config.ReportSettings,
            ("runs",),
            "moce report runs/mae runs/clusters runs/moce --out report.html",
        ),
        Command("demo", config.DemoSettings, (), "moce demo --out runs/demo"),
        Command("doctor", config.DoctorSettings, (), "moce doctor"),
    )
}
