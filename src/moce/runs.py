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

from moce.claims import claim
from moce.config import EvaluateSettings, Settings, expand
from moce.data.sources import paths_of
from moce.errors import MoceError
from moce.parsing import read_yaml
from moce.placement import apart
from moce.processes import is_main, of_main, wait_for_all

WEIGHTS, INFO, CONFIG, METRICS = "model.safetensors", "model.json", "config.yaml", "metrics.jsonl"
SKIPPED, STATE, TIMINGS = "skipped.jsonl", "state", "timings.jsonl"
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
    | {"rows.jsonl", "results.md", "evaluation.json"}
    | {"model.onnx", "preprocessing.json", "preprocessor_config.json", "architecture.json"}
)
OWN_FILES = PROOFS | EXTRAS | {WEIGHTS, METRICS, TIMINGS, SKIPPED}
DEMO_RUNS = frozenset({"mae", "clusters", "moce", "mae_plus"})
FOLDERS_OF_RUNS = frozenset({"backbones", "finetune"})  # of the demo, of evaluations
HEADROOM_RUN = re.compile(r"all|group\d+")
FREE_TO_CHANGE = frozenset(
    {"resume", "overwrite", "out", "threads", "log_every", "save_every"}
    | {"max_skipped", "strategy", "resident", "grad_checkpointing"}
)
# Each row of an evaluation stands for itself: a resumed one may be asked for others.
ROWS_TO_MAKE = frozenset({"backbones", "protocols", "tasks", "role", "root"})


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
    wait_for_all()
    if is_main():
        _open_folder(path, settings)
    wait_for_all()
    return path


def _open_folder(path: Path, settings: Settings) -> None:
    check_folder(path, settings)
    try:
        path.mkdir(parents=True, exist_ok=True)
        claim(path)
        if getattr(settings, "resume", False):
            _remove_temporaries(path)
        else:
            _empty(path)
    except OSError as error:
        raise MoceError(f"cannot make {path}: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Make a folder that files go to, if it is not there. Raises MoceError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
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


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place if all went well.

    Raises MoceError if it cannot be written; nothing is left of it then.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())  # on disk before it has its name, should the power fail
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing to `path` becomes a MoceError that names it."""
    try:
        yield
    except OSError as error:
        raise MoceError(f"cannot write {path}: {error.strerror or error}") from error


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add a line of JSON to a file. A process killed meanwhile may leave a part of it."""
    line = json.dumps(content, allow_nan=False) + "\n"
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


def write_text(path: Path, text: str) -> None:
    """Write a file. As all that is written to a run: of several processes, the main one does."""
    if not is_main():
        return
    with atomic(path) as temporary:
        # A path may hold bytes that are no text; they are written as \udcff.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Save tensors by name as safetensors; of several processes, the main one does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not is_main():
        return
    with atomic(path) as temporary:
        try:
            save_file(apart(tensors), temporary, metadata)
        except SafetensorError as error:
            raise MoceError(f"cannot write {path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises MoceError if the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot read weights {path}: {error}") from None


def read_tensor_metadata(path: Path) -> dict[str, str]:
    """What `write_tensors` was told beside the tensors. Raises MoceError as `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot read weights {path}: {error}") from None


def write_config(folder: Path, settings: Settings) -> None:
    """Write the settings as they were resolved, in their order."""
    content = settings.model_dump(mode="json", by_alias=True)
    write_text(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings a run was started with. Raises MoceError if they are missing or damaged."""
    try:
        content = read_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoceError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(content, dict):
        raise MoceError(f"{folder / CONFIG} is damaged: it holds no settings")
    return content


def check_unchanged(folder: Path, settings: Settings) -> None:
    """Raise MoceError, showing the difference, if a resumed run's settings are not those it began with."""
    before, now = read_config(folder), settings.model_dump(mode="json", by_alias=True)
    free = FREE_TO_CHANGE | (ROWS_TO_MAKE if isinstance(settings, EvaluateSettings) else set())
    free |= {"base_lr"} if getattr(settings, "lr_grid", ()) else set()  # the grid's choice is there
    # A setting that an older version did not know was off.
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in free and before.get(name) != value and (name in before or value)
    ]
    if changed:
        raise MoceError(f"cannot resume {folder} with other settings: {'; '.join(changed)}")


def write_model(folder: Path, kind: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write weights, then what they are: a folder with model.json is a finished run."""
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / INFO, {"kind": kind, **info, **provenance()})


def read_model(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(info, tensors) of a finished run. Raises MoceError if it is none, or of another kind."""
    info = read_info(folder)
    if info["kind"] != kind:
        raise MoceError(f"{folder} is a run of kind '{info['kind']}', not '{kind}'")
    return info, read_tensors(folder / WEIGHTS)


def read_info(folder: Path) -> dict[str, Any]:
    """model.json of a run. Raises MoceError if the folder is no finished run."""
    path = Path(folder) / INFO
    if not path.is_file():
        unfinished = (Path(folder) / CONFIG).is_file()
        reason = "is not finished (run its verb again)" if unfinished else "is not a moce run"
        raise MoceError(f"{folder} {reason}: it has no {INFO}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        info["kind"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise MoceError(f"{path} is damaged: {error}") from None
    return info


def provenance() -> dict[str, Any]:
    """Versions and git revision, so that a result can be traced."""
    packages = ("moce", "torch", "timm", "numpy")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"versions": versions, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Revision of the checkout moce runs from; None when it is installed as a package."""
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_skipped(folder: Path, skipped: list[tuple[str, str]], say: Callable[[str], None]) -> None:
    """List the images that could not be read, and say how many there are."""
    if skipped:
        lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in skipped]
        write_text(folder / SKIPPED, "".join(lines))
        say(f"skipped {len(skipped)} unreadable images (listed in {folder / SKIPPED})")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; what follows a line cut short by a kill is left out."""
    return read_lines(Path(folder) / METRICS, "step")


def read_timings(folder: Path) -> list[dict[str, Any]]:
    """The lines of timings.jsonl; of runs older than it, metrics.jsonl has the times."""
    rows = read_lines(Path(folder) / TIMINGS, "step")
    return rows or [row for row in read_metrics(folder) if "step_s" in row]


def read_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, if any, up to the first that is damaged or lacks `key`."""
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or (key is not None and key not in row):
            break
        rows.append(row)
    return rows


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl. Raises MoceError if there is none."""
    rows = of_main(lambda: read_metrics(folder)[-1:])
    if not rows:
        raise MoceError(f"{folder / METRICS} is missing or damaged; train again with --overwrite")
    return rows[-1]
