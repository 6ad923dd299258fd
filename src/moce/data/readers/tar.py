"""Tar files of images, such as WebDataset shards: indexed once, members read in place."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path, PurePosixPath

from moce.data.decode import open_encoded
from moce.data.readers.sample import (
    Sample,
    as_text,
    error_line,
    from_path,
    is_image_name,
    refused,
)
from moce.errors import MoceError

RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MOST_LABEL_BYTES = 1024
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


def read_shards(pattern: str) -> list[Sample]:
    """The images of tar files, named SHARD/MEMBER. Raises MoceError if a file is missing.

    The label is the content of the member KEY.cls, or the member's folder.
    """
    paths = find_shards(pattern)
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [path.as_posix() for path in paths]
    return [
        sample
        for path, name in zip(paths, names, strict=True)
        for sample in _read_shard(path, name)
    ]


def _read_shard(path: Path, name: str) -> Iterator[Sample]:
    members, broken = _index(path)
    labels = {
        _key(member.name): _read_member(path, member).decode("utf-8", "replace").strip()
        for member in members
        if member.name.endswith(".cls") and member.isreg() and member.size <= MOST_LABEL_BYTES
    }
    for member in members:
        if is_image_name(member.name) and not member.isdir():
            yield _sample(path, name, member, labels.get(_key(member.name)))
    if broken:
        yield refused(f"{name}/", f"the archive is broken from here on: {broken}")


def _index(path: Path) -> tuple[list[tarfile.TarInfo], str]:
    """All members up to the first error, and the error, or an empty string."""
    if not path.is_file():  # a pipe would block
        raise MoceError(f"{path} is not a file")
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(path, "r:") as archive:
            members.extend(archive)  # keeps what comes before an error
            if not _ends(path, archive.offset):  # tarfile stops silently at a corrupt header
                return members, "neither an image nor the archive's end"
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if path.open("rb").read(2) == b"\x1f\x8b":
            raise MoceError(
                f"{path} is compressed, so images cannot be read in place: gunzip it"
            ) from None
        return members, error_line(error)
    return members, ""


def _ends(path: Path, offset: int) -> bool:
    """True if the end of an archive, a block of zeros, is at `offset`."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _sample(path: Path, shard: str, member: tarfile.TarInfo, label: str | None) -> Sample:
    inside = PurePosixPath(as_text(member.name))
    identity = f"{shard}/{as_text(member.name)}"
    if inside.is_absolute() or ".." in inside.parts:
        return refused(identity, "the name leads out of the archive")
    if not member.isreg() or member.issparse():
        return refused(identity, "a link or sparse file, not an image")
    found = from_path(inside.as_posix(), lambda: open_encoded(_read_member(path, member)), label)
    return Sample(f"{shard}/{inside.as_posix()}", found.open, found.label, found.split)


def _read_member(path: Path, member: tarfile.TarInfo) -> bytes:
    if path.stat().st_size < member.offset_data + member.size:
        raise EOFError("the archive ends within the image")
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
