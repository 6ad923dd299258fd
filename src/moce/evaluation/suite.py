"""Suites: labeled tasks as data. A YAML file names tasks, labels, metrics and the probes' settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from moce.config import FinetuneSettings, Metric, ProbeSettings, Role, Settings
from moce.config.base import Count
from moce.config.load import parse, read_recipe
from moce.data.readers.factory import located
from moce.errors import MoceError

# Settings of the single verbs that `moce evaluate` gives itself.
OWN = frozenset(
    {"backbone", "data", "out", "overwrite", "resume", "json", "kind", "metric", "num_labels"}
    | {"draw", "draws", "seed", "device", "precision", "threads"}
)


class SuiteTask(Settings):
    """One labeled task. role: whether defaults may be tuned on it."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    data: str
    metric: Metric | None = None
    labels: Count | None = None
    role: Role = "held_out"


class Suite(Settings):
    """Tasks, and the settings of `moce probe` and `moce finetune` that every backbone gets alike."""

    name: str
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)
    probe: dict[str, Any] = Field({})
    finetune: dict[str, Any] = Field({})
    draws: Count = 1
    labels: Count | None = None


def read_suite(path: Path, root: Path) -> Suite:
    """The suite of a YAML file, its relative paths of data taken from `root`.

    Raises MoceError, with all mistakes in one line, if it is no suite.
    """
    try:
        suite = parse(Suite, read_recipe(path))
    except MoceError as error:
        raise MoceError(f"suite {path}: {error}") from None
    _check_section(path, "probe", ProbeSettings, suite.probe)
    _check_section(path, "finetune", FinetuneSettings, suite.finetune)
    names = [task.name for task in suite.tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise MoceError(f"suite {path} has two tasks named {double[0]}")
    tasks = tuple(
        task.model_copy(update={"data": located(task.data, root)}) for task in suite.tasks
    )
    return suite.model_copy(update={"tasks": tasks})


def _check_section(path: Path, name: str, kind: type[Settings], values: dict[str, Any]) -> None:
    """Raise MoceError unless a section holds settings of its verb that the evaluation leaves alone."""
    own = sorted(OWN & values.keys())
    if own:
        raise MoceError(f"suite {path}: {name} must not set {own[0]}: that is for the evaluation")
    if name == "finetune" and {"base_lr", "lr_grid"} <= values.keys():
        raise MoceError(f"suite {path}: finetune has base_lr beside lr_grid: leave out one of them")
    fill = {"backbone": "", "data": "", **({"out": "x"} if name == "finetune" else {})}
    try:
        parse(kind, {**fill, **values})
    except MoceError as error:
        raise MoceError(f"suite {path}: {name}: {error}") from None


def pick_tasks(suite: Suite, names: tuple[str, ...], role: Role | None) -> list[SuiteTask]:
    """The tasks of these names (none: all) and role. Raises MoceError for unknown names or no task."""
    known = [task.name for task in suite.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MoceError(f"no task '{unknown[0]}' in suite {suite.name} (valid: {', '.join(known)})")
    tasks = [task for task in suite.tasks if not names or task.name in names]
    chosen = [task for task in tasks if role is None or task.role == role]
    if not chosen:
        raise MoceError(f"suite {suite.name} has no task of role {role} among those asked for")
    return chosen
