"""Names, settings and examples of all commands, and the function that each one calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

from moce import config
from moce.config.load import parse
from moce.config.signature import docstring_of, signature_of
from moce.errors import MoceError
from moce.runs.lock import locks_released
from moce.runtime.launch import launch
from moce.runtime.light_imports import defer_imports

if TYPE_CHECKING:
    from moce.commands.cluster import ClusterResult
    from moce.commands.convert import ConvertResult
    from moce.commands.customize import CustomizeResult
    from moce.commands.demo import DemoResult
    from moce.commands.distill import DistillResult
    from moce.commands.doctor import DoctorResult
    from moce.commands.embed import EmbedResult
    from moce.commands.evaluate import EvaluateResult
    from moce.commands.explore import ExploreResult
    from moce.commands.export import ExportResult
    from moce.commands.finetune import FinetuneResult
    from moce.commands.headroom import HeadroomResult
    from moce.commands.pack import PackResult
    from moce.commands.predict import PredictResult
    from moce.commands.pretrain import PretrainResult
    from moce.commands.probe import ProbeResult
    from moce.commands.push import PushResult
    from moce.commands.report import ReportResult
    from moce.commands.run import RunResult
    from moce.commands.train import TrainResult


@dataclass(frozen=True)
class Command:
    """A command of `moce`, and the function `moce.NAME`.

    work: imports the command's module and runs it; positional: settings that need no flag;
    distributed: several processes can share the work.
    """

    work: Callable[[Any], Any]
    settings: type[config.Settings]
    positional: tuple[str, ...]
    example: str
    distributed: bool = False

    @property
    def name(self) -> str:
        return self.work.__name__

    @property
    def signature(self) -> Signature:
        """Of `moce.NAME`: all settings with type and default."""
        return signature_of(self.settings, self.positional, self.work.__annotations__["return"])

    def run(self, values: dict[str, Any], shown: Callable[[str], str] | None = None) -> Any:
        """Validate the values, then do the work. Raises MoceError for any mistake in them.

        shown: how the caller writes a setting, for messages.
        """
        settings = parse(self.settings, values, shown)
        if launch().world_size > 1 and not self.distributed:
            raise MoceError(
                f"moce {self.name} runs in one process, but {launch().by} started "
                f"{launch().world_size}; run it without {launch().by}"
            )
        defer_imports()
        with locks_released():
            return self.work(settings)

    def function(self) -> Callable[..., Any]:
        """`moce.NAME`: the settings are its arguments, as `help` and completion show."""
        signature = self.signature
        first = [signature.parameters[name] for name in self.positional]
        others = Parameter("settings", Parameter.VAR_KEYWORD)  # checked by `run`, with better hints

        def call(*args: Any, **kwargs: Any) -> Any:
            values = Signature([*first, others]).bind_partial(*args, **kwargs).arguments
            settings = values.pop("settings", {})
            return self.run({**values, **settings})

        call.__name__ = call.__qualname__ = self.name
        call.__module__ = "moce"
        call.__doc__ = docstring_of(self.settings, signature)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call


COMMANDS: dict[str, Command] = {}


def command(*given: Any, **more: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the function of a command; the arguments are those of `Command` after `work`."""

    def register(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
        COMMANDS[work.__name__] = Command(work, *given, **more)
        return work

    return register


# The imports are in the functions, so that `moce --help` does not import torch.


@command(
    config.PipelineSettings,
    ("data",),
    "moce run photos/ --tasks birds/,cars/ --out runs/x",
)
def run(settings: config.PipelineSettings) -> RunResult:
    from moce.commands.run import run

    return run(settings)


@command(config.PackSettings, ("data",), "moce pack photos/ --shorter-side 512 --out packed/")
def pack(settings: config.PackSettings) -> PackResult:
    from moce.commands.pack import run

    return run(settings)


@command(
    config.PretrainSettings,
    ("data",),
    "moce pretrain photos/ --out runs/mae --model vit_base_patch16_224 --epochs 400",
    distributed=True,
)
def pretrain(settings: config.PretrainSettings) -> PretrainResult:
    from moce.commands.pretrain import run

    return run(settings)


@command(
    config.ClusterSettings,
    ("data",),
    "moce cluster photos/ --mae runs/mae --num-clusters 64 --out runs/clusters",
    distributed=True,
)
def cluster(settings: config.ClusterSettings) -> ClusterResult:
    from moce.commands.cluster import run

    return run(settings)


@command(
    config.TrainSettings,
    ("data",),
    "moce train photos/ --mae runs/mae --clusters runs/clusters --num-experts 8 --out runs/moce",
    distributed=True,
)
def train(settings: config.TrainSettings) -> TrainResult:
    from moce.commands.train import run

    return run(settings)


@command(
    config.HeadroomSettings,
    ("data",),
    "moce headroom photos/ --mae runs/mae --clusters runs/clusters --out runs/headroom",
)
def headroom(settings: config.HeadroomSettings) -> HeadroomResult:
    from moce.commands.headroom import run

    return run(settings)


@command(
    config.CustomizeSettings,
    ("run", "images"),
    "moce customize runs/moce birds/ --out backbones/birds",
    distributed=True,
)
def customize(settings: config.CustomizeSettings) -> CustomizeResult:
    from moce.commands.customize import run

    return run(settings)


@command(
    config.ExportSettings,
    ("run",),
    "moce export runs/moce --route 2-0 --format transformers --out backbones/route",
)
def export(settings: config.ExportSettings) -> ExportResult:
    from moce.commands.export import run

    return run(settings)


@command(
    config.DistillSettings,
    ("backbone", "data"),
    "moce distill backbones/birds photos/ --model vit_small_patch16_224 --out backbones/small",
)
def distill(settings: config.DistillSettings) -> DistillResult:
    from moce.commands.distill import run

    return run(settings)


@command(config.PushSettings, ("folder", "repo"), "moce push backbones/birds my-name/birds")
def push(settings: config.PushSettings) -> PushResult:
    from moce.commands.push import run

    return run(settings)


@command(
    config.ConvertSettings,
    ("weights",),
    "moce convert mae_pretrain_vit_base.pth --out mae_base.safetensors",
)
def convert(settings: config.ConvertSettings) -> ConvertResult:
    from moce.commands.convert import run

    return run(settings)


@command(
    config.EmbedSettings,
    ("backbone", "data"),
    "moce embed backbones/birds birds/ --out birds.parquet",
    distributed=True,
)
def embed(settings: config.EmbedSettings) -> EmbedResult:
    from moce.commands.embed import run

    return run(settings)


@command(
    config.FinetuneSettings,
    ("backbone", "data"),
    "moce finetune backbones/birds birds/ --out runs/birds --epochs 100",
    distributed=True,
)
def finetune(settings: config.FinetuneSettings) -> FinetuneResult:
    from moce.commands.finetune import run

    return run(settings)


@command(
    config.PredictSettings,
    ("model", "data"),
    "moce predict runs/birds photos/ --out predictions",
)
def predict(settings: config.PredictSettings) -> PredictResult:
    from moce.commands.predict import run

    return run(settings)


@command(
    config.ProbeSettings,
    ("backbone", "data"),
    "moce probe backbones/birds birds/ --kind linear --draws 3 --num-labels 200",
    distributed=True,
)
def probe(settings: config.ProbeSettings) -> ProbeResult:
    from moce.commands.probe import run

    return run(settings)


@command(
    config.EvaluateSettings,
    ("suite",),
    "moce evaluate recipes/suites/paper11.yaml --out runs/eval "
    "--backbones mae+=runs/mae_plus,moce=runs/moce",
    distributed=True,
)
def evaluate(settings: config.EvaluateSettings) -> EvaluateResult:
    from moce.commands.evaluate import run

    return run(settings)


@command(
    config.ReportSettings,
    ("runs",),
    "moce report runs/mae runs/clusters runs/moce --out report.html",
)
def report(settings: config.ReportSettings) -> ReportResult:
    from moce.commands.report import run

    return run(settings)


@command(config.ExploreSettings, ("run", "images"), "moce explore runs/moce")
def explore(settings: config.ExploreSettings) -> ExploreResult:
    from moce.commands.explore import run

    return run(settings)


@command(config.DemoSettings, (), "moce demo --out runs/demo")
def demo(settings: config.DemoSettings) -> DemoResult:
    from moce.commands.demo import run

    return run(settings)


@command(config.DoctorSettings, (), "moce doctor")
def doctor(settings: config.DoctorSettings) -> DoctorResult:
    from moce.commands.doctor import run

    return run(settings)
