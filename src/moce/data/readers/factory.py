"""Where images come from: one DATA argument, read by whichever kind of source it names.

Every image has a stable identity (its path inside the folder, its row in the file), so that
clusters made once stay attached to it. Several sources, with commas between them or in a list
@FILE, put their own name before it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from moce.config import expand
from moce.data.readers.folder import read_folder
from moce.data.readers.huggingface import HUB_PREFIX, is_saved, read_hub, read_saved
from moce.data.readers.numpy_arrays import read_arrays
from moce.data.readers.packed import Packed, find_packed
from moce.data.readers.parquet import (
    DEMO_PREFIX,
    demo_samples,
    demo_table,
    demo_tasks,
    parquet_samples,
    read_parquet,
)
from moce.data.readers.sample import SPLITS, SUFFIXES, Sample, file_sample, is_image_name
from moce.data.readers.tar import expand_braces, matching, read_shards
from moce.data.readers.torchvision import TORCHVISION_PREFIX, torchvision_rows
from moce.errors import MoceError

__all__ = [
    "SPLITS",
    "SUFFIXES",
    "Part",
    "Sample",
    "demo_table",
    "demo_tasks",
    "is_named",
    "located",
    "open_parts",
    "open_source",
    "parts_of",
    "paths_of",
    "read_parquet",
]

LIST_PREFIX = "@"
ACCEPTED = (
    "a folder, image files, .parquet, .npy, .npz, .tar or packed files, @LIST, hf:NAME or "
    "demo:pretrain"
)

Read = Callable[[str], list[Sample]]
NAMED: dict[str, Read] = {
    DEMO_PREFIX: demo_samples,
    TORCHVISION_PREFIX: lambda name: [Sample(*row) for row in torchvision_rows(name)],
    HUB_PREFIX: read_hub,
}
BY_SUFFIX: dict[str, Read] = {
    ".parquet": lambda data: parquet_samples(read_parquet(Path(data)), data),
    ".npy": lambda data: read_arrays(Path(data), data),
    ".npz": lambda data: read_arrays(Path(data), data),
}


def is_named(data: str) -> bool:
    """Whether a DATA argument is a name, such as demo:digits, and no path."""
    return data.startswith(tuple(NAMED))


@dataclass(frozen=True)
class Part:
    """One source of several: data, where it is; written, what it is called in the argument or list."""

    data: str
    written: str


def open_source(data: str) -> list[Sample]:
    """The entries of a DATA argument. Raises MoceError if there is no such source or it is empty."""
    return open_parts(parts_of(data))


def open_parts(parts: Sequence[Part]) -> list[Sample]:
    """The entries of several sources, the source's name before each identity if there are others."""
    if not parts:
        raise MoceError(f"no images named; give {ACCEPTED}")
    counts = Counter(part.data for part in parts)
    double = [name for name, count in counts.items() if count > 1]
    if double:
        raise MoceError(f"{double[0]} is named {counts[double[0]]} times")
    if len(parts) == 1:
        return _unique(_open(parts[0]))
    samples = []
    for part, name in zip(parts, _names(parts), strict=True):
        own = name is None  # a single file is called by its path already
        samples += [e if own else replace(e, id=f"{name}/{e.id}") for e in _open(part)]
    return _unique(samples)


def _open(part: Part) -> list[Sample]:
    """The entries of one source: the registry of kinds."""
    data = part.data
    for prefix, read in NAMED.items():
        if data.startswith(prefix):
            return read(data.removeprefix(prefix))
    path = expand(Path(data))
    suffix = path.suffix.lower()
    if suffix == ".tar" and not os.path.isdir(path):  # noqa: PTH112 - a pattern is no path
        return read_shards(str(path))
    if not _exists(path):
        raise MoceError(f"no such images: {data[:500]} (give {ACCEPTED})")
    if path.is_dir():
        return read_saved(path) if is_saved(path) else read_folder(path)
    if suffix in BY_SUFFIX and path.is_file():
        return BY_SUFFIX[suffix](str(path))
    if is_image_name(path.name) and path.is_file():
        return [file_sample(path, part.written)]
    packed = find_packed(data)
    if packed is not None:
        return _packed_samples(packed)
    raise MoceError(f"no images in {data}: it is none of what can be read (give {ACCEPTED})")


def parts_of(data: str) -> list[Part]:
    """The sources that a DATA argument names: separated by commas, or the lines of @FILE."""
    if not data or _exists(expand(Path(data))):
        return [Part(data, data)] if data else []
    parts = [part.strip() for part in _split_outside_braces(data)]
    if not all(parts):
        raise MoceError(f"an empty name between the commas of '{data}'")
    return [source for part in parts for source in _listed(part)]


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises for names that are too long


def _split_outside_braces(data: str) -> list[str]:
    parts, depth = [""], 0
    for letter in data:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _listed(part: str) -> list[Part]:
    """The lines of @FILE, relative to its folder; any other part itself."""
    if not part.startswith(LIST_PREFIX):
        return [Part(part, part)]
    path = expand(Path(part.removeprefix(LIST_PREFIX)))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MoceError(f"cannot read the list {path}: {error}") from None
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise MoceError(f"the list {path} names no images")
    if any(line.startswith(LIST_PREFIX) for line in named):
        raise MoceError(f"the list {path} names another list; give both, with a comma between them")
    return [Part(line if is_named(line) else _beside(path, line), line) for line in named]


def _beside(path: Path, line: str) -> str:
    place = expand(Path(line))
    return str(place if place.is_absolute() else path.parent / place)


def _packed_samples(packed: Packed) -> list[Sample]:
    columns = (packed.ids, packed.openers(), packed.labels, packed.splits)
    return [Sample(*row) for row in zip(*columns, strict=True)]


def _names(parts: Sequence[Part]) -> list[str | None]:
    """What tells several sources apart: the last part of each path, or more of it if it must be."""
    paths = [PurePosixPath(part.written.replace("\\", "/")) for part in parts]
    folders = [not is_image_name(path.name) for path in paths]
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]).strip("/") for path in paths]
        chosen = [name for name, folder in zip(names, folders, strict=True) if folder]
        if len(set(chosen)) == len(chosen) or depth >= max(len(path.parts) for path in paths):
            return [n if folder else None for n, folder in zip(names, folders, strict=True)]
        depth += 1


def _unique(samples: list[Sample]) -> list[Sample]:
    """Of entries with the same identity, all but the first get a number: name#2, name#3."""
    seen: Counter[str] = Counter()
    for place, sample in enumerate(samples):
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            samples[place] = replace(sample, id=f"{sample.id}#{seen[sample.id]}")
    return samples


def located(data: str, root: Path) -> str:
    """A DATA argument with relative paths taken from `root`; names such as demo:digits stay."""
    if not data or _exists(root / data):
        return str(root / data)
    return ",".join(_located(part.strip(), root) for part in _split_outside_braces(data))


def _located(part: str, root: Path) -> str:
    if is_named(part):
        return part
    prefix = LIST_PREFIX if part.startswith(LIST_PREFIX) else ""
    return f"{prefix}{root / expand(Path(part.removeprefix(prefix)))}"


def paths_of(data: str) -> list[Path]:
    """The files and folders that a DATA argument reads, whether they are there or not."""
    paths = [part.data for part in parts_of(data) if not is_named(part.data)]
    return [expand(Path(text)) for path in paths for text in _files_of(path)]


def _files_of(path: str) -> list[str]:
    if not path.endswith(".tar"):
        return [path]
    return [file for text in expand_braces(path) for file in matching(text) or [text]]
