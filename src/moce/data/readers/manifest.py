"""The list of what `moce pack` wrote to a folder: its shards, with sizes and checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moce.data.readers.storage import LocalFile, local_file
from moce.errors import MoceError, raise_if_corrupt

MANIFEST = "_manifest.json"  # pandas and datasets pass over it
JOURNAL = "_progress.jsonl"  # in its place, while the folder is written
FORMAT = "moce images"


@dataclass(frozen=True)
class Shard:
    """One file. images: in it. sources: images that were read for it, readable or not."""

    file: str
    images: int
    sources: int
    bytes: int
    sha256: str
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """made: how the images were encoded, in words."""

    made: str
    shards: Sequence[Shard]

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Ids of images that could not be read, and why."""
        return [pair for shard in self.shards for pair in shard.skipped]

    def to_json(self) -> dict[str, object]:
        return {"format": FORMAT, "version": 1, **asdict(self), "images": self.images}


def is_pack(path: Path) -> bool:
    """Whether moce pack wrote a folder, completely or not, or PATH is its manifest."""
    names = (MANIFEST, JOURNAL)
    return path.name == MANIFEST or any((path / name).is_file() for name in names)


def as_shard(row: dict[str, Any]) -> Shard:
    """A shard from its line of JSON."""
    return Shard(**{**row, "skipped": [(name, reason) for name, reason in row["skipped"]]})


def read_manifest(path: Path) -> Manifest:
    """The manifest in a folder, or itself. Raises MoceError if it is missing or corrupt."""
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file() and path.with_name(JOURNAL).is_file():
        raise MoceError(f"{path.parent} is not packed completely; run its moce pack again")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoceError(f"cannot read {path}: {error}") from None
    return parse_manifest(path, text)


def parse_manifest(name: Path | str, text: str) -> Manifest:
    """The manifest of this text. Raises MoceError that names it if it is corrupt."""
    with raise_if_corrupt(name):
        found = json.loads(text)
        if found["format"] != FORMAT or found["version"] != 1:
            raise ValueError(f"it is not a list of {FORMAT}, version 1")
        shards = [as_shard(row) for row in found["shards"]]
        for shard in shards:
            if Path(shard.file).name != shard.file:
                raise ValueError(f"the shard {shard.file} is outside the folder")
        return Manifest(str(found["made"]), shards)


def packed_shards(path: Path) -> list[LocalFile]:
    """The files of a folder that `moce pack` wrote. Raises MoceError if one is missing or changed.

    Compares sizes only: `verify` reads the files.
    """
    folder, files = path if path.is_dir() else path.parent, []
    for shard in read_manifest(path).shards:
        if not (folder / shard.file).exists():
            raise MoceError(f"{folder / shard.file} is missing; pack the images again")
        files.append(local_file(folder / shard.file))
        if files[-1].size != shard.bytes:
            raise _changed(folder, f"{shard.file} has {files[-1].size} bytes, not {shard.bytes}")
    return files


def verify(path: Path, advance: Callable[[int], None]) -> None:
    """Compare the checksums of all shards; calls `advance` with the number of images of each.

    Raises MoceError that names the first that has changed.
    """
    folder = path if path.is_dir() else path.parent
    packed_shards(path)
    for shard in read_manifest(path).shards:
        if sha256(folder / shard.file) != shard.sha256:
            raise _changed(folder, f"{shard.file} does not match its checksum")
        advance(shard.images)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(folder: Path, reason: str) -> MoceError:
    return MoceError(
        f"{folder} has changed since it was packed: {reason}; pack the images again, or remove "
        f"{MANIFEST} to take its files as they are"
    )
