"""Suites: YAML files of labeled tasks, their metrics, and the settings of probes and fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from moce.config import FinetuneSettings, Metric, ProbeSettings, Role, Settings
from moce.config.base import Count
from moce.config.load import parse, read_recipe
from moce.data.readers.factory import located
from moce.errors import MoceError

# Settings of moce probe and moce finetune that moce evaluate sets itself.
OWN = frozenset(
    {"backbone", "data", "out", "overwrite", "resume", "json", "kind", "metric", "num_labels"}
    | {"draw", "draws", "seed", "device", "precision", "threads"}
)


class SuiteTask(Settings):
    """A labeled task. role: development, to tune defaults on, or held_out."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    data: str
    metric: Metric | None = None
    labels: Count | None = None
    role: Role = "held_out"


class Suite(Settings):
    """Tasks, and the settings of `moce probe` and `moce finetune`, the same for every backbone."""

    name: str
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)
    probe: dict[str, Any] = Field({})
    finetune: dict[str, Any] = Field({})
    draws: Count = 1
    labels: Count | None = None


def read_suite(path: Path, root: Path) -> Suite:
    """Read a suite from YAML; relative paths of data start from `root`.

    Raises MoceError, with all mistakes in one line, if the file is not a valid suite.
    """
    try:
        suite = parse(Suite, read_recipe(path))
    except MoceError as error:
        raise MoceError(f"suite {path}: {error}") from None
    _check_section(path, "probe", ProbeSettings, suite.probe)
    _check_section(path, "finetune", FinetuneSettings, suite.finetune)
    names = [task.name for task in suite.tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MoceError(f"suite {path} has two tasks named {twice[0]}")
    tasks = tuple(
        task.model_copy(update={"data": located(task.data, root)}) for task in suite.tasks
    )
    return suite.model_copy(update={"tasks": tasks})


def _check_section(path: Path, name: str, kind: type[Settings], values: dict[str, Any]) -> None:
    """Raise MoceError if a section has a setting that its command lacks or the evaluation sets."""
    own = sorted(OWN & values.keys())
    if own:
        raise MoceError(f"suite {path}: {name} must not set {own[0]}: moce evaluate sets it")
    if name == "finetune" and {"base_lr", "lr_grid"} <= values.keys():
        raise MoceError(
            f"suite {path}: finetune has base_lr beside lr_grid: leave out one of the two"
        )
    fill = {"backbone": "", "data": "", **({"out": "x"} if name == "finetune" else {})}
    try:
        parse(kind, {**fill, **values})
    except MoceError as error:
        raise MoceError(f"suite {path}: {name}: {error}") from None


def pick_tasks(suite: Suite, names: tuple[str, ...], role: Role | None) -> list[SuiteTask]:
    """Tasks by name (all if none is given) and role. Raises MoceError for an unknown name or no task."""
    known = [task.name for task in suite.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MoceError(f"no task '{unknown[0]}' in suite {suite.name} (valid: {', '.join(known)})")
    tasks = [task for task in suite.tasks if not names or task.name in names]
    chosen = [task for task in tasks if role is None or task.role == role]
    if not chosen:
        raise MoceError(f"suite {suite.name} has no task of role {role} among the requested ones")
    return chosen
