"""Suites: YAML files of labeled tasks, their metrics, and the settings of probes and fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from moce.config import EvaluateSettings, FinetuneSettings, Metric, ProbeSettings, Role, Settings
from moce.config.base import Count
from moce.config.dense import Task as TaskName
from moce.config.facts import facts_of
from moce.config.load import parse, read_recipe, with_new_names
from moce.config.usage import check_used, replaced_by
from moce.data.readers.factory import located
from moce.errors import MoceError

DENSE_TASKS = ("detect", "segment")
PROBES = ("linear", "knn")
# By task, the protocols of `moce evaluate` that it has, and their names in rows of results. A linear
# probe of a segmentation task is a linear layer on frozen patch tokens.
PROTOCOLS: dict[str, dict[str, str]] = {
    "classify": {"linear": "linear", "knn": "knn", "finetune": "finetune"},
    "detect": {"finetune": "detect"},
    "segment": {"finetune": "segment", "linear": "segment_linear"},
}
Section = Annotated[dict[str, Any], AfterValidator(with_new_names)]


class SuiteTask(Settings):
    """A labeled task. role: development, to tune defaults on, or held_out.

    task: what the labels are for; annotations: where boxes or masks are, if not beside the images.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    data: str
    metric: Metric | None = None
    labels: Count | None = None
    role: Role = "held_out"
    task: TaskName = "classify"
    annotations: str | None = None


class Suite(Settings):
    """Tasks, and the settings of `moce probe` and `moce finetune`, the same for every backbone.

    detect, segment: settings of `moce finetune` for these tasks; finetune: for classification.
    """

    name: str
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)
    probe: Section = Field({})
    finetune: Section = Field({})
    detect: Section = Field({})
    segment: Section = Field({})
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
    for name in ("finetune", *DENSE_TASKS):
        _check_section(path, name, FinetuneSettings, getattr(suite, name))
    for task in suite.tasks:
        if task.task in DENSE_TASKS and task.metric is not None:
            raise MoceError(
                f"suite {path}: {task.name} must not set metric: {task.task} has its own"
            )
    names = [task.name for task in suite.tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MoceError(f"suite {path} has two tasks named {twice[0]}")
    tasks = tuple(_located(task, root) for task in suite.tasks)
    return suite.model_copy(update={"tasks": tasks})


def _located(task: SuiteTask, root: Path) -> SuiteTask:
    places = {"data": located(task.data, root)}
    if task.annotations is not None:
        places["annotations"] = located(task.annotations, root)
    return task.model_copy(update=places)


def _check_section(path: Path, name: str, kind: type[Settings], values: dict[str, Any]) -> None:
    """Raise MoceError unless a section holds settings of its command that `moce evaluate` leaves alone."""
    own = EvaluateSettings.model_fields.keys() | {
        setting
        for setting, facts in facts_of(kind).items()
        if "input" in facts or facts.get("set_by_evaluate")
    }
    wrong = sorted(own & values.keys())
    if wrong:
        raise MoceError(f"suite {path}: {name} must not set {wrong[0]}: moce evaluate sets it")
    for setting, other in replaced_by(kind, values).items():
        if setting in values:
            raise MoceError(
                f"suite {path}: {name} has {setting} and {other}: leave out one of them"
            )
    fill = {"backbone": "", "data": "", **({} if name == "probe" else {"out": "x"})}
    fill |= {"task": name} if name in DENSE_TASKS else {}
    try:
        settings = parse(kind, {**fill, **values})
        if name in DENSE_TASKS:
            check_used(settings, settings)
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
