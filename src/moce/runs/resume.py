"""Same settings and inputs as before, or refuse to resume.

state/inputs.json has a line per input: how many images, with a checksum of their names and labels,
and checksums of the weights that the run starts from. Pixels are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from moce.config import RunSettings, expand
from moce.config.facts import facts_of
from moce.config.load import parse
from moce.config.usage import replaced_by
from moce.errors import MoceError
from moce.runs.files import write_json
from moce.runs.model import CONFIG, STATE, read_config

R = TypeVar("R", bound=RunSettings)

FILE = "inputs.json"
SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".parquet"}
SHOWN = 12  # digits of a checksum


# --- settings -------------------------------------------------------------------------------------


def resumes(settings: RunSettings) -> bool:
    """Whether there is a run to resume, and the settings ask for it."""
    return bool(getattr(settings, "resume", False)) and (settings.out / CONFIG).is_file()


def recorded_settings(settings: R) -> R:
    """The settings in config.yaml, overridden by those given now."""
    given = settings.model_dump(mode="json", include=settings.model_fields_set)
    for name in ("device", "precision", "micro_batch_size"):
        if given.get(name) == "auto":
            del given[name]
    return parse(type(settings), {**_recorded(settings), **given})


def _recorded(settings: RunSettings) -> dict[str, Any]:
    """The values in config.yaml, and those that an older version, which lacks them, stands for."""
    facts = facts_of(settings).items()
    before = {name: fact["before"] for name, fact in facts if "before" in fact}
    return {**before, **read_config(settings.out)}


def check_unchanged(settings: RunSettings) -> None:
    """Raise MoceError, showing the difference, if a setting that must not change has changed."""
    before, now = _recorded(settings), settings.model_dump(mode="json")
    facts, replaced = facts_of(settings), replaced_by(type(settings), now)
    # A setting that an older version did not have was off.
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if not facts[name].get("may_change")
        and name not in replaced
        and before.get(name) != value
        and (name in before or value)
    ]
    if changed:
        raise MoceError(f"cannot resume {settings.out} with other settings: {'; '.join(changed)}")


# --- inputs ---------------------------------------------------------------------------------------


def describe_images(ids_and_labels: Iterable[tuple[str, Any]]) -> str:
    """The number of images, with a checksum of their ids and labels."""
    digest, count = hashlib.sha256(), 0
    for identity, label in ids_and_labels:
        digest.update(json.dumps([identity, label]).encode())
        count += 1
    return f"{count} images {digest.hexdigest()[:SHOWN]}"


def describe_weights(references: dict[str, Any]) -> dict[str, str]:
    """By the same names, checksums of the files that paths of weights hold; other names are left out."""
    files = {name: _files_of(expand(Path(value))) for name, value in references.items()}
    return {name: f"weights {_digest(found)}" for name, found in files.items() if found}


def _files_of(path: Path) -> list[Path]:
    """The files of weights (or of the clusters of images) at a path; none for the name of a model."""
    if path.is_dir():
        return sorted(c for c in path.iterdir() if c.suffix in SUFFIXES and c.is_file())
    return [path] if path.is_file() else []


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:SHOWN]


def write_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Record the inputs of a run, described as above."""
    (folder / STATE).mkdir(exist_ok=True)
    write_json(folder / STATE / FILE, inputs)


def training_size(run: Path) -> int | None:
    """How many images a run was started with; None for what is no such run."""
    try:
        described = json.loads((run / STATE / FILE).read_text(encoding="utf-8"))["data"]
        return int(described.split()[0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def check_inputs(folder: Path, now: dict[str, str]) -> None:
    """Raise MoceError, showing the difference, if a run was started with other inputs."""
    path = folder / STATE / FILE
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoceError(f"cannot read {path}: {error}") from None
    refuse_changes(folder, before if isinstance(before, dict) else {}, now)


def refuse_changes(folder: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raise MoceError, showing the difference, if an input in `before` is not the same `now`."""
    changed = [
        f"{name} was {was}, is {now.get(name, 'gone')}"
        for name, was in before.items()
        if was != now.get(name)
    ]
    if changed:
        raise MoceError(
            f"cannot resume {folder}, its inputs have changed: {'; '.join(changed)}; restore them, or "
            "start over with --overwrite"
        )
