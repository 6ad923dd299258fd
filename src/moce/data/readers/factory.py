"""Which reader a DATA argument needs.

DATA names one source of images, several separated by commas, or the sources listed in @FILE. Every
image has a stable id (its path in the folder, its row in the file), so that assignments to clusters
stay valid. With several sources, the source's name precedes the id.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from moce.config import expand
from moce.data.readers.columns import label_column, text_column
from moce.data.readers.folder import read_folder
from moce.data.readers.huggingface import HUB_PREFIX, is_saved, read_hub, read_saved
from moce.data.readers.labels import label_of
from moce.data.readers.lists import expand_name, path_and_label, plain_path, read_list
from moce.data.readers.manifest import is_pack, packed_shards
from moce.data.readers.numpy_arrays import read_arrays
from moce.data.readers.packed import check_large_enough, find_packed
from moce.data.readers.parquet import DEMO_PREFIX, demo_samples, read_parquet_files
from moce.data.readers.remote import find_remote, is_url
from moce.data.readers.sample import Encoded, Sample, as_text, is_image_name
from moce.data.readers.splits import inner_split, places, source_splits
from moce.data.readers.storage import Storage, local_file
from moce.data.readers.table import FileTable, JoinedTable, ListTable, SampleTable, ids_of
from moce.data.readers.tar import expand_braces, find_shards, matching, read_tar_files
from moce.data.readers.torchvision import TORCHVISION_PREFIX, read_torchvision
from moce.errors import MoceError

LIST_PREFIX = "@"
ACCEPTED = (
    "a folder, image files, .parquet, .npy, .npz, .tar or packed files, @LIST, hf:NAME or "
    "demo:pretrain"
)

NAMED: dict[str, Callable[[str], Sequence[Sample]]] = {
    DEMO_PREFIX: demo_samples,
    TORCHVISION_PREFIX: read_torchvision,
    HUB_PREFIX: read_hub,
}
ARRAYS = {".npy", ".npz"}
READ_SHARDS: dict[str, Callable[[Sequence[Storage], str], Sequence[Sample]]] = {
    ".tar": read_tar_files,
    ".parquet": lambda files, pattern: read_parquet_files(files),
}


def is_named(data: str) -> bool:
    """True if DATA is a name, such as demo:digits, not a path."""
    return data.startswith(tuple(NAMED))


def is_elsewhere(data: str) -> bool:
    """True if DATA is a name or a URL, not a path."""
    return is_named(data) or is_url(data)


@dataclass(frozen=True, slots=True)
class Source:
    """One source of images. data: its name or path; written: the same as the user wrote it.

    label: of the image, if a list gives one.
    """

    data: str
    written: str
    label: str | None = None


def open_source(data: str) -> SampleTable:
    """The images that DATA names. Raises MoceError if there are none."""
    return open_sources(sources_of(data))


def open_sources(sources: Sequence[Source]) -> SampleTable:
    """The images of all sources; if there are several, ids start with the source's name."""
    if not sources:
        raise MoceError(f"no images named; give {ACCEPTED}")
    counts = Counter(source.data for source in sources)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise MoceError(f"{twice[0]} is named {counts[twice[0]]} times")
    if len(sources) == 1:
        return _unique(_open(sources[0]))
    others = [source for source in sources if not _is_image(source)]
    splits = source_splits([source.written for source in others])
    named = dict(zip(others, zip(_names(others), splits, strict=True), strict=True))
    files = _open_files([source for source in sources if source not in named])
    parts: list[SampleTable] = []
    used = 0
    for in_one, group in groupby(sources, key=lambda source: source not in named):
        those = list(group)
        if in_one and files is not None:
            parts.append(files.select(range(used, used := used + len(those))))
        else:
            parts += [_within(source, *named[source]) for source in those]
    return _unique(parts[0] if len(parts) == 1 else JoinedTable(parts))


def _is_image(source: Source) -> bool:
    return is_image_name(source.written) and not os.path.isdir(expand_name(source.data))  # noqa: PTH112


def _within(source: Source, name: str, split: str | None) -> SampleTable:
    """The images of one of several sources."""
    table = _open(source).with_prefix(f"{name}/")
    return table.in_split(lambda inner: inner_split(inner, split, source.data))


def _open_files(sources: Sequence[Source]) -> FileTable | None:
    """Single image files, with the labels and splits of their paths."""
    if not sources:
        return None
    for source in sources:
        if not _is_file(source.data):
            _open(source)  # says why not
    paths = [os.path.abspath(expand_name(source.data)) for source in sources]  # noqa: PTH100
    common = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    inside = [path.removeprefix(common).lstrip("/") for path in paths]
    placed = places([*map(as_text, inside)], as_text(common), PurePosixPath(common).name)
    labels = [
        place.label if (own := label_of(source.label)) is None else own
        for place, source in zip(placed, sources, strict=True)
    ]
    splits = text_column([place.split for place in placed])
    # Identified by the path as the user wrote it.
    ids = [as_text(plain_path(source.written)) for source in sources]
    root = paths[0].removesuffix(ids[0])
    if all(path == root + name for path, name in zip(paths, ids, strict=True)):
        return FileTable(Path(root), ids, Encoded, label_column(labels), splits)
    return FileTable(Path(common), inside, Encoded, label_column(labels), splits, ids)


def _is_file(path: str) -> bool:
    return os.path.isfile(expand_name(path))  # noqa: PTH113 - pathlib's raises for long names


def _open(source: Source) -> SampleTable:
    """The images of a source. Raises MoceError if there are none."""
    samples = _read(source)
    if not samples:
        raise MoceError(f"no images in {source.data}")
    return samples if isinstance(samples, SampleTable) else ListTable(samples)


def _read(source: Source) -> Sequence[Sample]:
    data = source.data
    for prefix, read in NAMED.items():
        if data.startswith(prefix):
            return read(data.removeprefix(prefix))
    if is_url(data):
        suffix, files = find_remote(data, expand_braces)
        return READ_SHARDS[suffix](files, data)
    path = expand(Path(data))
    suffix = path.suffix.lower()
    if suffix in READ_SHARDS and not os.path.isdir(path):  # noqa: PTH112 - a pattern is not a path
        return READ_SHARDS[suffix]([local_file(file) for file in find_shards(str(path))], str(path))
    if not _exists(path):
        raise MoceError(f"no such images: {data[:500]} (give {ACCEPTED})")
    if is_pack(path):
        return read_parquet_files(packed_shards(path))
    if path.is_dir():
        return read_saved(path) if is_saved(path) else read_folder(path)
    if suffix in ARRAYS and path.is_file():
        return read_arrays(path)
    if is_image_name(path.name) and path.is_file():
        # Identified by the path as the user wrote it.
        name = as_text(Path(source.written).as_posix())
        return [Sample(name, Encoded(path), label_of(source.label))]
    packed = find_packed(data)
    if packed is not None:
        return packed.samples()
    raise MoceError(f"no images in {data}: not a format that moce reads (give {ACCEPTED})")


def sources_of(data: str) -> list[Source]:
    """The sources that DATA names: separated by commas, or the lines of @FILE."""
    if not data or _exists(expand(Path(data))):
        return [Source(data, data)] if data else []
    names = [name.strip() for name in _split_at_commas(data)]
    if not all(names):
        raise MoceError(f"an empty name between the commas of '{data}'")
    return [source for name in names for source in _listed(name)]


def check_packs(data: str, size: tuple[int, int]) -> None:
    """Raise MoceError if a packed file among the sources of DATA has images smaller than `size` (h, w)."""
    sources = sources_of(data)
    for source in sources:
        # Of several sources, what is named like an image is read as one, so it need not be opened here.
        packed = None if len(sources) > 1 and _is_image(source) else find_packed(source.data)
        if packed is not None:
            check_large_enough(packed, size)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises for names that are too long


def _split_at_commas(data: str) -> list[str]:
    """Split at commas outside of braces."""
    names, depth = [""], 0
    for letter in data:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += letter
    return names


def _listed(name: str) -> list[Source]:
    """The lines of @FILE, relative to its folder; any other name itself."""
    if not name.startswith(LIST_PREFIX):
        return [Source(name, name)]
    path = expand(Path(name.removeprefix(LIST_PREFIX)))
    lines = read_list(path)
    if any(line.startswith(LIST_PREFIX) for line in lines):
        raise MoceError(f"the list {path} names another list; give both, separated by a comma")
    found = [path_and_label(line, path.parent) for line in lines]
    return [Source(_located(line, path.parent), line, label) for line, label in found]


def _names(sources: Sequence[Source]) -> list[str]:
    """The last part of each source's path, or as many parts as make the names different."""
    paths = [PurePosixPath(source.written.replace("\\", "/")) for source in sources]
    deepest = max((len(path.parts) for path in paths), default=1)
    for depth in range(1, deepest + 1):
        names = ["/".join(path.parts[-depth:]).strip("/") for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _unique(found: SampleTable) -> SampleTable:
    """Number repeated ids: name, name#2, name#3."""
    if found.unique:
        return found
    seen = Counter[str]()
    ids: list[str] = []
    for name in ids_of(found):
        seen[name] += 1
        ids.append(f"{name}#{seen[name]}" if seen[name] > 1 else name)
    return found.renamed(ids)


def located(data: str, root: Path) -> str:
    """DATA with relative paths taken from `root`; names such as demo:digits stay."""
    if not data or _exists(root / data):
        return str(root / data)
    return ",".join(_located(name.strip(), root) for name in _split_at_commas(data))


def _located(name: str, root: Path) -> str:
    if is_elsewhere(name):
        return name
    prefix = LIST_PREFIX if name.startswith(LIST_PREFIX) else ""
    path = os.path.join(root, expand_name(name.removeprefix(prefix)))  # noqa: PTH118
    return f"{prefix}{plain_path(path)}"


def paths_of(data: str) -> list[Path]:
    """The files and folders that DATA names, existing or not."""
    names = [source.data for source in sources_of(data) if not is_elsewhere(source.data)]
    return [expand(Path(path)) for name in names for path in _files_of(name)]


def _files_of(name: str) -> list[str]:
    if not name.endswith(tuple(READ_SHARDS)):
        return [name]
    return [path for text in expand_braces(name) for path in matching(text) or [text]]
