"""Tar files of images, such as WebDataset shards: indexed once, members read in place."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow

from moce.data.readers.sample import as_text, error_line, is_image_name, split_and_label
from moce.data.readers.storage import Storage, are_far
from moce.data.readers.table import SampleTable
from moce.errors import MoceError

RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MOST_LABEL_BYTES = 1024
MOST_SHARDS = 10**6
INDEXED_AT_ONCE = 8


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


@dataclass(frozen=True)
class _Place:
    """Where the image of a row lies, or why it is not read."""

    offset: int = 0
    size: int = 0
    refused: str = ""


@dataclass(frozen=True)
class _Reader:
    """Reads members. first_rows: [s + 1] int64, of each file. offsets, sizes: [n] int64.

    refused: why, of rows that are not read.
    """

    files: Sequence[Storage]
    first_rows: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    refused: dict[int, str]

    def __call__(self, row: int) -> bytes:
        if row in self.refused:
            raise ValueError(self.refused[row])
        file = self.files[int(np.searchsorted(self.first_rows, row, "right")) - 1]
        start, size = int(self.offsets[row]), int(self.sizes[row])
        if start + size > file.size:
            raise EOFError("the archive ends within the image")
        return file.read(start, size)


@dataclass(frozen=True)
class _Shard:
    """The images of one archive. columns: ids, labels, splits."""

    columns: tuple[pyarrow.Array, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    refused: dict[int, str]


def read_tar_files(files: Sequence[Storage]) -> SampleTable:
    """The images of tar files, named SHARD/MEMBER. Raises MoceError if a file cannot be read.

    The label is the content of the member KEY.cls, or the member's folder.
    """
    paths = [PurePosixPath(file.name) for file in files]
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    with ThreadPoolExecutor(INDEXED_AT_ONCE) as pool:
        shards = list(pool.map(_read_shard, files, names))
    first_rows = np.cumsum([0, *(len(shard.offsets) for shard in shards)])
    refused = {
        int(first) + row: reason
        for first, shard in zip(first_rows, shards, strict=False)
        for row, reason in shard.refused.items()
    }
    offsets, sizes = (
        np.concatenate([getattr(shard, name) for shard in shards]) for name in ("offsets", "sizes")
    )
    ids, labels, splits = (
        pyarrow.concat_arrays(parts) for parts in zip(*(s.columns for s in shards), strict=True)
    )
    reader = _Reader(files, first_rows, offsets, sizes, refused)
    return SampleTable(ids, reader, labels, splits, first_rows if are_far(files) else None)


def _read_shard(file: Storage, name: str) -> _Shard:
    found = list(_members(file, name))
    ids, splits, labels, places = zip(*found, strict=True) if found else ((), (), (), ())
    return _Shard(
        (
            pyarrow.array(ids, pyarrow.large_string()),
            pyarrow.array(labels, pyarrow.string()),
            pyarrow.array(splits, pyarrow.string()),
        ),
        np.array([place.offset for place in places], np.int64),
        np.array([place.size for place in places], np.int64),
        {row: place.refused for row, place in enumerate(places) if place.refused},
    )


def _members(file: Storage, name: str) -> Iterator[tuple[str, str | None, str | None, _Place]]:
    """Id, split, label and place of every image of an archive, and of what is refused."""
    members, broken = _index(file)
    labels = {
        _key(member.name): _text_of(file, member)
        for member in members
        if member.name.endswith(".cls") and member.isreg() and member.size <= MOST_LABEL_BYTES
    }
    for member in members:
        if is_image_name(member.name) and not member.isdir():
            yield _image(name, member, labels.get(_key(member.name)))
    if broken:
        reason = f"the archive is broken from here on: {broken}"
        yield f"{name}/", None, None, _Place(refused=reason)


def _text_of(file: Storage, member: tarfile.TarInfo) -> str:
    return file.read(member.offset_data, member.size).decode("utf-8", "replace").strip()


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


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _image(
    shard: str, member: tarfile.TarInfo, label: str | None
) -> tuple[str, str | None, str | None, _Place]:
    inside = PurePosixPath(as_text(member.name))
    identity = f"{shard}/{as_text(member.name)}"
    if inside.is_absolute() or ".." in inside.parts:
        reason = "the name leads out of the archive"
    elif not member.isreg() or member.issparse():
        reason = "a link or sparse file, not an image"
    else:
        split, folder = split_and_label(inside.as_posix())
        place = _Place(member.offset_data, member.size)
        return f"{shard}/{inside.as_posix()}", split, folder if label is None else label, place
    return identity, None, None, _Place(refused=reason)
