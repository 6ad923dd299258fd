"""moce run: pretrain, cluster, train, then customize and probe for each task; resumable.

Its pieces are the other commands: each writes the folder that it writes alone, and a finished piece is
not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm

from moce.commands import cluster, customize, pretrain, probe, train
from moce.commands.setup import refuse_unused, resolve, start_run
from moce.config import (
    ClusterSettings,
    CustomizeSettings,
    PipelineSettings,
    PretrainSettings,
    ProbeSettings,
    Settings,
    TrainSettings,
)
from moce.config.load import parse
from moce.data.readers.factory import open_source
from moce.errors import MoceError
from moce.evaluation.results import ROWS, read_rows
from moce.evaluation.task import by_name
from moce.runs.files import write_json
from moce.runs.model import INFO
from moce.runtime.progress import log

S = TypeVar("S", bound=Settings)
SELECTION = "selection.json"  # the last file of a customized folder
IMAGES_PER_CLUSTER, FEWEST_CLUSTERS, MOST_CLUSTERS = 32, 8, 256
CLUSTERS_PER_EXPERT, MOST_EXPERTS = 4, 8


@dataclass
class TaskScore:
    """backbone: a folder; mae, customized: linear probes, 0..1, None if the task has no labels."""

    task: str
    backbone: Path
    mae: float | None = None
    customized: float | None = None

    def summary(self) -> str:
        if self.mae is None or self.customized is None:
            return f"{self.task}: {self.backbone} (no labels: not probed)"
        return (
            f"{self.task}: {self.backbone}, linear probe {100 * self.customized:.1f} % (the MAE: "
            f"{100 * self.mae:.1f} %)"
        )


@dataclass
class RunResult:
    """run: the folder; tasks: what each task got."""

    run: Path
    tasks: list[TaskScore]

    def summary(self) -> str:
        return "\n".join([f"finished: {self.run}", *(task.summary() for task in self.tasks)])


def run(settings: PipelineSettings) -> RunResult:
    settings, _ = resolve(settings)
    if settings.mae is not None:
        _check_mae(settings, settings.mae)
    # Everything is opened and checked first: a mistake must not show after days.
    pieces = _pieces(settings, len(open_source(settings.data)))
    tasks = [_Task(settings, name, *found) for name, found in _tasks(settings.tasks).items()]
    start_run(settings)
    for name, (work, piece) in pieces.items():
        _once(name, settings.out / name, INFO, work, piece)
    scores = [task.run() for task in tasks]
    rows = [{**asdict(score), "backbone": str(score.backbone)} for score in scores]
    write_json(settings.out / "results.json", {"tasks": rows})
    return RunResult(settings.out, scores)


def _check_mae(settings: PipelineSettings, mae: Path) -> None:
    refuse_unused(settings, ("model", "init", "epochs", "pretrain"), "--mae needs no pretraining")
    if not mae.exists() and not timm.is_model(str(mae)):
        raise MoceError(
            f"{mae} is not a run, a file or folder of weights, or the name of a timm model"
        )


def _tasks(tasks: tuple[str, ...]) -> dict[str, tuple[str, bool]]:
    """The DATA of each task by its name, and whether it has labels. Raises MoceError if one is empty."""
    return {
        name: (data, any(sample.label is not None for sample in open_source(data)))
        for name, data in by_name(tasks).items()
    }


def _pieces(settings: PipelineSettings, count: int) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """By folder, the command that writes it and its settings, all valid. count: training images."""
    out, mae = settings.out, settings.mae or settings.out / "mae"
    clusters = max(FEWEST_CLUSTERS, min(MOST_CLUSTERS, count // IMAGES_PER_CLUSTER))
    sizes = {"num_clusters": clusters, **settings.cluster}
    most = max(2, int(sizes["num_clusters"]) // CLUSTERS_PER_EXPERT)
    experts = {"num_experts": min(MOST_EXPERTS, most), **settings.train}
    of = lambda name: {"data": settings.data, "out": out / name}  # noqa: E731
    pieces: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "clusters": (
            cluster.run,
            _piece(settings, ClusterSettings, mae=mae, **of("clusters"), **sizes),
        ),
        "moce": (
            train.run,
            _piece(
                settings,
                TrainSettings,
                mae=mae,
                clusters=out / "clusters",
                **of("moce"),
                **experts,
            ),
        ),
    }
    if settings.mae is not None:
        return pieces
    first = _piece(settings, PretrainSettings, **of("mae"), **_given(settings))
    return {"mae": (pretrain.run, first), **pieces}


def _given(settings: PipelineSettings) -> dict[str, Any]:
    """The settings of pretrain that were given."""
    names = ("model", "init", "epochs")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return {**given, **settings.pretrain}


def _piece(settings: PipelineSettings, kind: type[S], **values: Any) -> S:
    """Settings of a piece, with device, precision, seed and threads of the whole."""
    shared = ("seed", "device", "precision", "threads", "max_skipped")
    own = {name: getattr(settings, name) for name in shared}
    return parse(kind, {**own, **values})


def _once(title: str, folder: Path, last: str, work: Callable[[Any], Any], piece: Settings) -> None:
    """Run a piece, unless its last file shows that it is finished; resume it if it had started."""
    if (folder / last).is_file():
        log(f"— {title}: finished before, {folder}")
        return
    log(f"— {title}")
    started = folder.is_dir() and any(folder.iterdir())
    again = {"resume": True} if "resume" in type(piece).model_fields else {"overwrite": True}
    work(piece.model_copy(update=again if started else {}))


class _Task:
    """Customizes for a task, and probes what it gets and what it would have without experts."""

    def __init__(self, settings: PipelineSettings, name: str, data: str, labeled: bool) -> None:
        out = settings.out
        self.name, self.labeled, self.folder = name, labeled, out / "backbones" / name
        values = {"run": out / "moce", "images": data, "out": self.folder}
        self.customize = _piece(settings, CustomizeSettings, **values, **settings.customize)
        backbones = {"mae": settings.mae or out / "mae", "customized": self.folder}
        values = {"data": data, "solver": "lbfgs", **settings.probe}
        self.probes = {
            kind: _piece(
                settings,
                ProbeSettings,
                backbone=str(backbone),
                out=out / "probes" / name / kind,
                **values,
            )
            for kind, backbone in backbones.items()
        }

    def run(self) -> TaskScore:
        _once(f"customize {self.name}", self.folder, SELECTION, customize.run, self.customize)
        if not self.labeled:
            return TaskScore(self.name, self.folder)
        scores = {}
        for kind, piece in self.probes.items():
            assert piece.out is not None
            _once(f"probe {self.name}, {kind}", piece.out, ROWS, probe.run, piece)
            (row,) = read_rows(piece.out)
            scores[kind] = sum(row["values"]) / len(row["values"])
        return TaskScore(self.name, self.folder, **scores)
