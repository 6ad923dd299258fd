"""Create, overwrite and clean output folders.

A run folder holds:

config.yaml         the settings, resolved
model.safetensors   the weights
model.json          what they are: kind, how to build it, metrics, versions, git revision
metrics.jsonl       one line per logged step, identical if the run is repeated
timings.jsonl       how long these steps took
skipped.jsonl       images that could not be read, if any
reconstructions/    pictures of what a masked autoencoder filled in, if measured while training
state/              checkpoints to resume from
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from moce.config import expand, settings_classes
from moce.errors import MoceError
from moce.runs.lock import lock_folder
from moce.runs.model import (
    CONFIG,
    INFO,
    METRICS,
    PICTURES,
    SKIPPED,
    STATE,
    TENSORBOARD,
    TIMINGS,
    WANDB,
    WEIGHTS,
)
from moce.runtime.distributed import barrier
from moce.runtime.launch import is_rank0

# What `atomic` writes to before a file gets its name; a killed process leaves it behind.
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # what its library writes to before that


# The names that any command writes to output folders; proofs: those that nobody else would write.
PROOFS = {INFO, CONFIG, TIMINGS}.union(*(kind.proofs for kind in settings_classes()))
FILES = PROOFS.union({WEIGHTS, METRICS, SKIPPED}, *(kind.files for kind in settings_classes()))
FOLDERS = {STATE, PICTURES, TENSORBOARD, WANDB}.union(
    *(kind.folders for kind in settings_classes())
)


def check_folder(
    path: Path,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
    inputs: Iterable[tuple[str, Path]] = (),
) -> None:
    """Raise MoceError unless a run can be written to `path`; nothing is changed.

    A folder with content is refused, unless it is resumed, or overwritten, written by moce alone and
    without an input. resume: None if the command cannot; inputs: settings, and the path each names.
    """
    if path.exists() and not path.is_dir():
        raise MoceError(f"{path} is a file; give a folder for the output")
    if not path.is_dir() or all(_is_temporary(child) for child in path.iterdir()):
        return
    if resume:
        if not (path / CONFIG).is_file():
            raise MoceError(f"{path} has no run to resume; choose another output folder")
    elif not overwrite:
        or_resume = "" if resume is None else ", or --resume to resume it"
        raise MoceError(f"{path} is not empty; add --overwrite to replace it{or_resume}")
    else:
        for name, place in inputs:
            check_apart(path, name, place)
        if path.is_symlink() or not _is_run(path):
            raise MoceError(
                f"{path} contains files that moce did not write; choose another output folder"
            )


def check_apart(path: Path, name: str, value: str | Path) -> None:
    """Raise MoceError if the input `name` (a path, or a name that is no path) is within `path`."""
    if expand(Path(value)).resolve().is_relative_to(path.resolve()):
        raise MoceError(f"{path} holds the input {name} ({value}); choose another output folder")


def open_folder(path: Path, check: Callable[[], None], *, keep: bool) -> Path:
    """Create and lock an output folder, after a last `check`; empty it unless `keep`.

    Of several processes, rank 0 does this after all have checked the folder.
    """
    barrier()
    if is_rank0():
        check()
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock_folder(path)
            _remove_temporaries(path) if keep else _empty(path)
        except OSError as error:
            raise MoceError(f"cannot make {path}: {error.strerror}") from None
    barrier()
    return path


def _empty(path: Path) -> None:
    """Remove the contents of a folder, not the folder: it may be a mount point.

    model.json goes first and config.yaml last, so that a folder that is half empty when the process
    is killed is no finished run, and can still be replaced or resumed.
    """
    order = {INFO: 0, STATE: 1, CONFIG: 3}
    for child in sorted(path.iterdir(), key=lambda child: order.get(child.name, 2)):
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
    match = TEMPORARY.fullmatch(path.name)
    known = match and (match[1] in FILES or path.parent.name in (STATE, PICTURES))
    if OF_SAFETENSORS.fullmatch(path.name):  # a name that others give, too
        known = path.parent.name == STATE or any((path.parent / name).exists() for name in PROOFS)
    return bool(known) and path.is_file()


def _is_run(path: Path) -> bool:
    """Whether a folder has a proof that moce wrote it, and nothing that moce did not write."""
    children = list(path.iterdir())
    proven = any(child.name in PROOFS for child in children)
    return proven and all(_is_known(child) for child in children)


def _is_known(path: Path) -> bool:
    """Whether moce wrote a file, or all of a folder: a run, folders of runs, or nothing."""
    if not path.is_dir():
        return path.name in FILES or path.name.startswith(".")
    if path.name in FOLDERS:
        return True
    children = list(path.iterdir())
    return _is_run(path) or all(child.is_dir() and _is_known(child) for child in children)
