"""Tar files of images, such as WebDataset shards: indexed once, members read in place."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow

from moce.data.formats import HINTS
from moce.data.readers.columns import label_column
from moce.data.readers.labels import from_text
from moce.data.readers.left_out import LeftOut
from moce.data.readers.sample import Label, as_text, error_line, is_image_name
from moce.data.readers.splits import inner_split, last_word, places, source_splits
from moce.data.readers.storage import Storage, are_far
from moce.data.readers.table import SampleTable
from moce.data.readers.tar_keys import LABEL_SUFFIXES, label_names, other_parts
from moce.errors import MoceError

RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MOST_LABEL_BYTES = 2**16
MOST_SHARDS = 10**6


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" to a-08.tar, a-09.tar, a-10.tar; {x,y} to x and y. Raises MoceError beyond 10^6."""
    done: list[str] = []
    pending = [pattern]
    while pending:
        text = pending.pop()
        found = RANGE.search(text) or CHOICE.search(text)
        if found is None:
            done.append(text)
            continue
        options = _options(found)
        if len(pending) + len(done) + len(options) > MOST_SHARDS:
            raise MoceError(f"{pattern} stands for more than {MOST_SHARDS:,} files")
        pending += [text[: found.start()] + option + text[found.end() :] for option in options]
    return sorted(done)


def _options(found: re.Match[str]) -> list[str]:
    if found.re is CHOICE:
        return found[1].split(",")
    first, last = int(found[1]), int(found[2])
    if last - first > MOST_SHARDS:
        raise MoceError(f"{found[0]} stands for more than {MOST_SHARDS:,} files")
    width = len(found[1]) if found[1].startswith("0") or len(found[1]) == len(found[2]) else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def matching(text: str) -> list[str]:
    """The file of this name, or those that * and ? stand for, in order."""
    if os.path.exists(text):  # noqa: PTH110 - pathlib's raises for names that are too long
        return [text]
    return sorted(glob(text))  # noqa: PTH207 - may be absolute


def find_shards(pattern: str) -> list[Path]:
    """The files of a pattern with {000..012}, * or ?. Raises MoceError if one is missing."""
    paths = []
    for text in expand_braces(pattern):
        found = matching(text)
        if not found:
            raise MoceError(
                f"no such images: {text}" + (f" (of {pattern})" if text != pattern else "")
            )
        paths += [Path(file) for file in found]
    return paths


@dataclass(frozen=True, slots=True)
class _Found:
    """One image of an archive, and its path there. refused: why it is not read."""

    id: str
    path: str = ""
    label: Label | None = None
    offset: int = 0
    size: int = 0
    refused: str = ""


@dataclass(frozen=True)
class _Reader:
    """Reads the images of rows. places: [n, 3] int64, the number of the file, offset and size.

    refused: why, of rows that are not read.
    """

    files: Sequence[Storage]
    places: np.ndarray
    refused: dict[int, str]

    def __call__(self, row: int) -> bytes:
        if row in self.refused:
            raise ValueError(self.refused[row])
        number, start, size = self.places[row].tolist()
        if start + size > self.files[number].size:
            raise EOFError("the archive ends within the image")
        return self.files[number].read(start, size)


def read_tar_files(files: Sequence[Storage], pattern: str) -> SampleTable:
    """The images of the tar files that `pattern` names, with ids SHARD/MEMBER.

    The label is that of the member KEY.cls or KEY.json, or the member's folder. Raises MoceError if
    a file cannot be read.
    """
    paths = [PurePosixPath(file.name) for file in files]
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    left_out = LeftOut(pattern, HINTS)
    shards = [_read_shard(*each, left_out) for each in zip(files, names, strict=True)]
    left_out.report()
    found = [(number, image) for number, shard in enumerate(shards) for image in shard]
    outer = source_splits([str(path) for path in paths])
    placed = places([image.path for _, image in found], pattern, last_word(pattern))
    labels = [
        p.label if f.label is None else f.label for p, (_, f) in zip(placed, found, strict=True)
    ]
    splits = [
        inner_split(place.split, outer[number], f"{pattern}: {image.path}")
        for place, (number, image) in zip(placed, found, strict=True)
    ]
    where = [(number, image.offset, image.size) for number, image in found]
    refused = {row: image.refused for row, (_, image) in enumerate(found) if image.refused}
    first_rows = np.cumsum([0, *map(len, shards)])
    return SampleTable(
        pyarrow.array([image.id for _, image in found], pyarrow.large_string()),
        _Reader(files, np.array(where, np.int64).reshape(-1, 3), refused),
        label_column(labels),
        pyarrow.array(splits, pyarrow.string()),
        first_rows if are_far(files) else None,
    )


def _read_shard(file: Storage, name: str, left_out: LeftOut) -> list[_Found]:
    members, broken = _index(file)
    shown = [member for member in members if not left_out.is_hidden(member.name)]
    parts = other_parts(member.name for member in shown)
    for kind in parts.values():
        left_out.add(kind)
    left_out.add_others(member.name for member in shown if not is_image_name(member.name))
    texts = {
        member.name: member
        for member in shown
        if member.name.endswith(LABEL_SUFFIXES)
        and member.isreg()
        and member.size <= MOST_LABEL_BYTES
    }
    found = []
    for member in shown:
        if is_image_name(member.name) and not member.isdir() and member.name not in parts:
            text = next((texts[name] for name in label_names(member.name) if name in texts), None)
            label = None if text is None else _read_label(file, text)
            found.append(_image(name, member, label))
    if broken:
        reason = f"the archive is broken from here on: {broken}"
        found.append(_Found(f"{name}/", refused=reason))
    return found


def _read_label(file: Storage, member: tarfile.TarInfo) -> Label | None:
    text = file.read(member.offset_data, member.size).decode("utf-8", "replace")
    return from_text(text, PurePosixPath(member.name).suffix)


def _index(file: Storage) -> tuple[list[tarfile.TarInfo], str]:
    """All members up to the first error, and the error, or an empty string."""
    members: list[tarfile.TarInfo] = []
    try:
        with file.open() as content, tarfile.open(fileobj=content, mode="r:") as archive:
            members.extend(archive)  # keeps what comes before an error
            if not _ends(file, archive.offset):  # tarfile stops silently at a corrupt header
                return members, "neither an image nor the archive's end"
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if file.size >= 2 and file.read(0, 2) == b"\x1f\x8b":
            raise MoceError(
                f"{file.name} is compressed, so images cannot be read in place: gunzip it"
            ) from None
        return members, error_line(error)
    return members, ""


def _ends(file: Storage, offset: int) -> bool:
    """True if the end of an archive, a block of zeros, is at `offset`."""
    size = tarfile.BLOCKSIZE
    return offset + size <= file.size and file.read(offset, size) == bytes(size)


def _image(shard: str, member: tarfile.TarInfo, label: Label | None) -> _Found:
    inside = PurePosixPath(as_text(member.name))
    identity = f"{shard}/{as_text(member.name)}"
    if inside.is_absolute() or ".." in inside.parts:
        return _Found(identity, refused="the name leads out of the archive")
    if not member.isreg() or member.issparse():
        name = f"{shard}/{inside.as_posix()}"
        return _Found(name, refused="a link or sparse file, not an image")
    name = inside.as_posix()
    return _Found(f"{shard}/{name}", name, label, member.offset_data, member.size)
