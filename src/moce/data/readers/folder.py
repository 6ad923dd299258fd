"""Folders of image files, at any depth; folders of parquet or .npy files if there are no others."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from moce.data.decode import Raster
from moce.data.formats import HINTS, suffixes
from moce.data.readers.columns import label_column, text_column
from moce.data.readers.label_tables import Entry, find_entries
from moce.data.readers.labels import from_text
from moce.data.readers.left_out import LeftOut, is_hidden
from moce.data.readers.numpy_arrays import open_array
from moce.data.readers.parquet import read_parquet_files
from moce.data.readers.sample import Encoded, Label, Sample, as_text, is_image_name, suffix_of
from moce.data.readers.splits import places
from moce.data.readers.storage import local_file
from moce.data.readers.table import FileTable
from moce.data.readers.tar_keys import LABEL_SUFFIXES, label_names, usual_parts
from moce.errors import MoceError


def read_folder(root: Path) -> Sequence[Sample]:
    """The images in a folder, named by their path in it. Raises MoceError if there are none."""
    left_out = LeftOut(str(root), HINTS)
    files = _files(root, left_out)
    parts = usual_parts(files)  # 1.seg.png beside 1.jpg
    for kind in parts.values():
        left_out.add(kind)
    images = [name for name in files if is_image_name(name) and name not in parts]
    opener: Callable[[Path], Callable[[], Raster]] = Encoded
    shards = [] if images else [name for name in files if suffix_of(name) == ".parquet"]
    if not images and not shards:  # next to images, .npy files are usually labels or masks
        images = [name for name in files if suffix_of(name) == ".npy"]
        opener = partial(partial, open_array)  # picklable openers
    used = {*(images or shards), *parts}
    left_out.add_others(name for name in files if name not in used)
    left_out.report()
    if shards:
        return read_parquet_files([local_file(root / name) for name in shards])
    if not images:
        known = " ".join(sorted(suffixes()))
        raise MoceError(f"no images in {root} (looked at any depth for {known} .parquet .npy)")
    labels, splits = _labels_and_splits(root, files, images)
    return FileTable(root, images, opener, label_column(labels), text_column(splits))


def _labels_and_splits(
    root: Path, files: Sequence[str], images: Sequence[str]
) -> tuple[list[Label | None], list[str | None]]:
    """Of each image: by tables, else by files beside it, else by its folders."""
    names = [as_text(name) for name in images]
    placed = places(names, str(root), root.resolve().name)
    labels: list[Label | None] = [place.label for place in placed]
    splits = [place.split for place in placed]
    texts = {name for name in files if suffix_of(name) in LABEL_SUFFIXES}
    for row, image in enumerate(images if texts else ()):
        label = _label_beside(root, image, texts)
        labels[row] = labels[row] if label is None else label
    entries = find_entries(root, files, names)
    if entries is not None:  # a table has no label for images that it does not name
        found = [entries.get(name, Entry(None, None)) for name in names]
        labels = [entry.label for entry in found]
        splits = [entry.split or split for entry, split in zip(found, splits, strict=True)]
    return labels, splits


def _label_beside(root: Path, image: str, texts: set[str]) -> Label | None:
    """The label in a file of the image's name, as in a tar file that was unpacked."""
    name = next((name for name in label_names(image) if name in texts), None)
    if name is None:
        return None
    try:
        return from_text((root / name).read_text(encoding="utf-8"), suffix_of(name))
    except (OSError, UnicodeDecodeError):
        return None


def list_images(root: Path, report: bool = False) -> list[Sample]:
    """The images in a folder by their paths in it, without splits and labels; [] if there are none.

    report: say what is left out.
    """
    left_out = LeftOut(str(root), HINTS)
    names = [name for name in _files(root, left_out) if is_image_name(name)]
    if report:
        left_out.report()
    return [Sample(as_text(name), Encoded(root / name)) for name in names]


def _files(root: Path, left_out: LeftOut) -> list[str]:
    """Files at any depth, by their path in the folder, sorted, without hidden entries.

    Follows links; visits a folder once, even if links form a loop. Text, not pathlib's objects:
    for a million files these would take longer than the disk.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending = deque([""])
    while pending:
        inside = pending.popleft()
        folder = root / inside
        try:
            status = folder.stat()
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except OSError as error:
            if not inside:
                raise MoceError(f"cannot read {root}: {error.strerror}") from None
            left_out.add_unreadable(inside)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        links: list[str] = []
        for child in children:
            name = f"{inside}/{child.name}" if inside else child.name
            if is_hidden(child.name):
                left_out.is_hidden(name)  # counts it
            elif _is_folder(child):
                # Real folders first, so that a path without links names the files.
                (links if child.is_symlink() else pending).append(name)
            elif _is_file(child):
                found.append(name)
        pending += links
    return sorted(found, key=lambda name: name.replace("/", "\0"))  # folder by folder


def _is_folder(child: os.DirEntry[str]) -> bool:
    if child.is_symlink():
        return os.path.isdir(child.path)  # noqa: PTH112 - the entry raises for a link to itself
    return child.is_dir()


def _is_file(child: os.DirEntry[str]) -> bool:
    """True for files and broken links, which are listed as skipped; pipes would block."""
    if not child.is_symlink():
        return child.is_file()
    exists = os.path.exists(child.path)  # noqa: PTH110 - pathlib's raises for a link to itself
    return os.path.isfile(child.path) or not exists  # noqa: PTH113
