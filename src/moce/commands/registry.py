"""The verbs: name, settings, positional arguments and an example. The CLI and the functions read it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from moce import config
from moce.config.load import parse
from moce.errors import MoceError
from moce.runs.lock import claims
from moce.runtime.launch import launch


@dataclass(frozen=True)
class Verb:
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
        if launch().world > 1 and not self.shared:
            raise MoceError(
                f"this is work for one process, and {launch().by} has started {launch().world}; "
                f"run it without {launch().by}"
            )
        with claims():
            return import_module(f"moce.verbs.{self.name}").run(settings)


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "pack",
            config.PackSettings,
            ("data",),
            "moce pack photos/ --size 256 --out photos.moce",
        ),
        Verb(
            "pretrain",
            config.PretrainSettings,
            ("data",),
            "moce pretrain photos/ --out runs/mae --model vit_base_patch16_224 --epochs 400",
            shared=True,
        ),
        Verb(
            "cluster",
            config.ClusterSettings,
            ("data",),
            "moce cluster photos/ --mae runs/mae --num-clusters 64 --out runs/clusters",
            shared=True,
        ),
        Verb(
            "train",
            config.TrainSettings,
            ("data",),
            "moce train photos/ --mae runs/mae --clusters runs/clusters --num-experts 8 "
            "--out runs/moce",
            shared=True,
        ),
        Verb(
            "headroom",
            config.HeadroomSettings,
            ("data",),
            "moce headroom photos/ --mae runs/mae --clusters runs/clusters --out runs/headroom",
        ),
        Verb(
            "customize",
            config.CustomizeSettings,
            ("run", "images"),
            "moce customize runs/moce birds/ --out backbones/birds",
        ),
        Verb(
            "export",
            config.ExportSettings,
            ("run",),
            "moce export runs/moce --route 2-0 --format transformers --out backbones/route",
        ),
        Verb(
            "convert",
            config.ConvertSettings,
            ("weights",),
            "moce convert mae_pretrain_vit_base.pth --out mae_base.safetensors",
        ),
        Verb(
            "embed",
            config.EmbedSettings,
            ("backbone", "data"),
            "moce embed backbones/birds birds/ --out birds.parquet",
        ),
        Verb(
            "finetune",
            config.FinetuneSettings,
            ("backbone", "data"),
            "moce finetune backbones/birds birds/ --out runs/birds --epochs 100",
            shared=True,
        ),
        Verb(
            "probe",
            config.ProbeSettings,
            ("backbone", "data"),
            "moce probe backbones/birds birds/ --kind linear --draws 3 --num-labels 200",
        ),
        Verb(
            "evaluate",
            config.EvaluateSettings,
            ("suite",),
            "moce evaluate recipes/suites/paper11.yaml --out runs/eval "
            "--backbones mae+=runs/mae_plus,moce=runs/moce",
        ),
        Verb(
            "report",
            config.ReportSettings,
            ("runs",),
            "moce report runs/mae runs/clusters runs/moce --out report.html",
        ),
        Verb("demo", config.DemoSettings, (), "moce demo --out runs/demo"),
        Verb("doctor", config.DoctorSettings, (), "moce doctor"),
    )
}
