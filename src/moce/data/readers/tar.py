"""Tar files of images, such as WebDataset shards: indexed once, members read in place."""

from __future__ import annotations

import os
import re
import tarfile
from functools import partial
from glob import glob
from pathlib import Path, PurePosixPath

from moce.data.formats import HINTS
from moce.data.readers.labels import from_text
from moce.data.readers.left_out import LeftOut
from moce.data.readers.sample import (
    Encoded,
    Label,
    Sample,
    as_text,
    error_line,
    is_image_name,
    refused,
)
from moce.data.readers.splits import last_word, place_samples, source_splits
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


def read_shards(pattern: str) -> list[Sample]:
    """The images of tar files, named SHARD/MEMBER. Raises MoceError if a file is missing.

    The label is that of the member KEY.cls or KEY.json, or the member's folder.
    """
    paths = find_shards(pattern)
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [path.as_posix() for path in paths]
    left_out = LeftOut(pattern, HINTS)
    found = [_read_shard(*each, left_out) for each in zip(paths, names, strict=True)]
    left_out.report()
    splits = source_splits([path.as_posix() for path in paths])
    outer = [split for split, shard in zip(splits, found, strict=True) for _ in shard]
    return place_samples(
        [each for shard in found for each in shard], pattern, last_word(pattern), outer
    )


def _read_shard(path: Path, name: str, left_out: LeftOut) -> list[tuple[str, Sample]]:
    """The images of a shard, each with its path in it."""
    members, broken = _index(path)
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
            label = None if text is None else _read_label(path, text)
            found.append(_sample(path, name, member, label))
    if broken:
        found.append(("", refused(f"{name}/", f"the archive is broken from here on: {broken}")))
    return found


def _read_label(path: Path, member: tarfile.TarInfo) -> Label | None:
    text = _read_member(path, member).decode("utf-8", "replace")
    return from_text(text, PurePosixPath(member.name).suffix)


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


def _sample(
    path: Path, shard: str, member: tarfile.TarInfo, label: Label | None
) -> tuple[str, Sample]:
    inside = PurePosixPath(as_text(member.name))
    identity = f"{shard}/{as_text(member.name)}"
    if inside.is_absolute() or ".." in inside.parts:
        return "", refused(identity, "the name leads out of the archive")
    if not member.isreg() or member.issparse():
        return "", refused(identity, "a link or sparse file, not an image")
    name = inside.as_posix()
    return name, Sample(f"{shard}/{name}", Encoded(partial(_read_member, path, member)), label)


def _read_member(path: Path, member: tarfile.TarInfo) -> bytes:
    if path.stat().st_size < member.offset_data + member.size:
        raise EOFError("the archive ends within the image")
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
