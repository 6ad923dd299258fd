"""What a run is made from, beside its settings: a resumed run must go on with the same.

state/inputs.json holds a line per input: how many images, with a checksum of their names and labels,
and checksums of the weights it starts from. What the pixels show is not looked at.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moce.config import Settings, expand
from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.runs.model import STATE
from moce.runs.files import write_json
from moce.config import EvaluateSettings
from moce.config import RunSettings
from typing import TypeVar
from moce.runs.folder import open_folder
from moce.config.load import parse
from moce.runs.model import read_config
from moce.runtime.progress import log
from moce.runs.model import write_config
from moce.runs.model import write_skipped

FREE_TO_CHANGE = frozenset(
    {"resume", "overwrite", "out", "threads", "log_every", "save_every"}
    | {"max_skipped", "strategy", "cache_on_gpu", "grad_checkpointing"}
)
# Each row of an evaluation stands for itself: a resumed one may be asked for others.
ROWS_TO_MAKE = frozenset({"backbones", "protocols", "tasks", "role", "root"})
R = TypeVar("R", bound=RunSettings)

FILE = "inputs.json"
STARTS = ("init", "mae", "clusters", "backbone")  # settings that name weights to start from
SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".parquet"}
SHOWN = 12  # digits of a checksum


def describe_inputs(settings: Settings, *sets: ImageDataset) -> dict[str, str]:
    """By the name of a setting, in words and checksums, what it stands for now."""
    found = {"data": f"{sum(map(len, sets))} images {_digest_of_names(sets)}"}
    given = {name: getattr(settings, name, None) for name in STARTS}
    return found | describe_weights({name: value for name, value in given.items() if value})


def describe_weights(references: dict[str, Any]) -> dict[str, str]:
    """By the same names, what files or folders of weights hold; names of models are left out."""
    files = {name: _files_of(expand(Path(value))) for name, value in references.items()}
    return {name: f"weights {_digest_of_files(found)}" for name, found in files.items() if found}


def check_inputs(folder: Path, now: dict[str, str]) -> None:
    """Raise MoceError, showing the difference, if a run began with other inputs."""
    path = folder / STATE / FILE
    if path.is_file():
        refuse_changes(folder, _read(path), now)


def refuse_changes(folder: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raise MoceError, showing the difference, if one of the inputs from `before` is another `now`."""
    changed = [
        f"{name} was {was}, is {now.get(name, 'gone')}"
        for name, was in before.items()
        if was != now.get(name)
    ]
    if changed:
        raise MoceError(
            f"cannot resume {folder}, its inputs have changed: {'; '.join(changed)}; put them back, "
            "or start again with --overwrite"
        )


def write_inputs(folder: Path, now: dict[str, str]) -> None:
    (folder / STATE).mkdir(exist_ok=True)
    write_json(folder / STATE / FILE, now)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoceError(f"cannot read {path}: {error}") from None
    return content if isinstance(content, dict) else {}


def _digest_of_names(sets: tuple[ImageDataset, ...]) -> str:
    digest = hashlib.sha256()
    for images in sets:
        for identity, label in zip(images.ids, images.labels, strict=True):
            digest.update(json.dumps([identity, label]).encode())
    return digest.hexdigest()[:SHOWN]


def _files_of(path: Path) -> list[Path]:
    """Those that hold weights (or the clusters of images) in a folder; none for the name of a model."""
    if path.is_dir():
        return sorted(child for child in path.iterdir() if child.suffix in SUFFIXES)
    return [path] if path.is_file() else []


def _digest_of_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:SHOWN]


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


def _as_started(settings: R) -> R:
    """The settings of config.yaml, overridden by those that were given now."""
    given = settings.model_dump(mode="json", by_alias=True, include=settings.model_fields_set)
    for name in ("device", "precision"):
        if given.get(name) == "auto":
            del given[name]
    return parse(type(settings), {**read_config(settings.out), **given})


def open_run(settings: RunSettings) -> Path:
    """The output folder, ready to write to: called when all inputs have been found good."""
    return open_folder(settings.out, settings)


def start_run(settings: RunSettings, *sets: ImageDataset) -> None:
    """Open the folder of a run that can be resumed, and note what it is made from: images and weights.

    Raises MoceError, before anything is written, if a resumed run was made from other ones.
    """
    inputs = describe_inputs(settings, *sets)
    if _resumes(settings):
        check_inputs(settings.out, inputs)
    open_run(settings)
    write_config(settings.out, settings)  # first: it says what the folder is
    write_inputs(settings.out, inputs)
    write_skipped(settings.out, [pair for images in sets for pair in images.skipped], log)


def _resumes(settings: RunSettings) -> bool:
    return bool(getattr(settings, "resume", False))
