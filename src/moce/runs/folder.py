"""Run folders: what every verb leaves and the next one reads. Atomic writes, no pickle.

config.yaml         the settings, resolved
model.safetensors   the weights
model.json          what they are: kind, how to build it, metrics, versions, git revision
metrics.jsonl       one line per logged step: the same again from the same settings
timings.jsonl       how fast these steps went
skipped.jsonl       images that could not be read, if any
state/              checkpoints to resume from
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from moce.runs.lock import lock_folder
from moce.config import EvaluateSettings, Settings, expand
from moce.data.readers.factory import paths_of
from moce.errors import MoceError
from moce.config.load import read_yaml
from moce.runs.files import clone_shared_tensors
from moce.runtime.distributed import is_rank0, run_on_rank0, barrier
from moce.runs.model import CONFIG
from moce.runs.model import INFO
from moce.runs.model import METRICS
from moce.runs.model import SKIPPED
from moce.runs.model import STATE
from moce.runs.model import TIMINGS
from moce.runs.model import WEIGHTS

# What `atomic` writes to before a file gets its name; a killed process leaves it behind.
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
INPUTS = (
    "data",
    "images",
    "init",
    "mae",
    "clusters",
    "run",
    "backbone",
    "suite",
    "task",
    "weights",
)
PROOFS = frozenset({INFO, CONFIG, "selection.json", "results.json", "demo.json", "export.json"})
READ_AS_DATA = frozenset({"data", "images", "task"})
EXTRAS = frozenset(
    {"assignments.parquet", "config.json", "README.md", "report.html"}
    | {"rows.jsonl", "results.md", "evaluation.json", "suite.yaml"}
    | {"model.onnx", "preprocessing.json", "preprocessor_config.json", "architecture.json"}
)
OWN_FILES = PROOFS | EXTRAS | {WEIGHTS, METRICS, TIMINGS, SKIPPED}
DEMO_RUNS = frozenset({"mae", "clusters", "moce", "mae_plus", "evaluation"})
FOLDERS_OF_RUNS = frozenset({"backbones", "finetune"})  # of the demo, of evaluations
HEADROOM_RUN = re.compile(r"all|group\d+")


def check_folder(path: Path, settings: Settings) -> None:
    """Raise MoceError if a run cannot go to `path`; nothing is changed.

    `settings` may hold overwrite, resume and inputs. A folder with content is refused unless it
    is to be resumed, or replaced and all moce's own work and none of the inputs.
    """
    resume = getattr(settings, "resume", None)
    if path.exists() and not path.is_dir():
        raise MoceError(f"{path} is a file; give a folder for the output")
    if not path.is_dir() or all(_is_temporary(child) for child in path.iterdir()):
        return
    if resume:
        if not (path / CONFIG).is_file():
            raise MoceError(f"{path} holds no run to resume; choose another output folder")
    elif not getattr(settings, "overwrite", False):
        go_on = "" if resume is None else ", or --resume to go on"
        raise MoceError(f"{path} is not empty; add --overwrite to replace it{go_on}")
    else:
        _check_apart(path, settings)
        if path.is_symlink() or not _is_ours(path):
            raise MoceError(f"{path} holds other things than a moce run; choose another folder")


def open_folder(path: Path, settings: Settings) -> Path:
    """Make the folder of a run, emptied if it is to be replaced. Raises as `check_folder`.

    The main process does, when all have looked at it.
    """
    barrier()
    if is_rank0():
        _open_folder(path, settings)
    barrier()
    return path


def _open_folder(path: Path, settings: Settings) -> None:
    check_folder(path, settings)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
        if getattr(settings, "resume", False):
            _remove_temporaries(path)
        else:
            _empty(path)
    except OSError as error:
        raise MoceError(f"cannot make {path}: {error.strerror}") from None




def _empty(path: Path) -> None:
    """Remove what is in a folder, not the folder: it may be a mount point.

    What says that a run is finished goes first and what says that it is one last, so that a folder
    that is half empty when the process is killed can still be replaced or resumed.
    """
    order = (INFO, STATE)
    places = {name: place - len(order) for place, name in enumerate(order)} | {CONFIG: 1}
    for child in sorted(path.iterdir(), key=lambda child: places.get(child.name, 0)):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _remove_temporaries(path: Path) -> None:
    """Remove what processes that were killed while writing left in a run and its state."""
    for child in path.rglob(".*"):
        if _is_temporary(child):
            child.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    named = TEMPORARY.fullmatch(path.name)
    ours = named is not None and (named[1] in OWN_FILES or path.parent.name == STATE)
    return ours and path.is_file()


def _check_apart(path: Path, settings: Settings) -> None:
    """Raise MoceError if emptying `path` would take an input with it."""
    for name in INPUTS:
        value = getattr(settings, name, None)
        if value is not None:
            for place in paths_of(value) if name in READ_AS_DATA else [value]:
                check_apart(path, name, place)


def check_apart(path: Path, name: str, value: str | Path) -> None:
    """Raise MoceError if the input `name`, a path or a name, lies in the output folder `path`."""
    if expand(Path(value)).resolve().is_relative_to(path.resolve()):
        raise MoceError(f"{path} holds the input {name} ({value}); choose another output folder")


def _is_ours(path: Path) -> bool:
    """Whether everything in a folder is of a kind that moce leaves, and something proves it."""
    children = list(path.iterdir())
    proven = any(child.name in PROOFS or child.name in DEMO_RUNS for child in children)
    return not children or (proven and all(_is_known(child) for child in children))


def _is_known(path: Path) -> bool:
    if not path.is_dir():
        return path.name in OWN_FILES or path.name.startswith(".")
    if path.name in FOLDERS_OF_RUNS:
        return _holds_runs(path)
    inner = path.name in DEMO_RUNS or HEADROOM_RUN.fullmatch(path.name)
    return path.name in (STATE, "tensorboard") or (bool(inner) and _is_ours(path))


def _holds_runs(path: Path) -> bool:
    """Whether a folder holds runs, or folders of runs, and nothing else."""
    children = list(path.iterdir())
    return all(child.is_dir() and (_is_ours(child) or _holds_runs(child)) for child in children)










































