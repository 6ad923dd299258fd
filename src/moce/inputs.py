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
from moce.data.images import ImageSet
from moce.errors import MoceError
from moce.runs import STATE, write_json

FILE = "inputs.json"
STARTS = ("init", "mae", "clusters", "backbone")  # settings that name weights to start from
SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".parquet"}
SHOWN = 12  # digits of a checksum


def describe_inputs(settings: Settings, *sets: ImageSet) -> dict[str, str]:
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


def _digest_of_names(sets: tuple[ImageSet, ...]) -> str:
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
