"""Folders of image files, at any depth; folders of parquet or .npy files if there are no others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from moce.data.decode import Raster
from moce.data.formats import HINTS, suffixes
from moce.data.readers.label_tables import Entry, find_entries
from moce.data.readers.labels import from_text
from moce.data.readers.left_out import LeftOut
from moce.data.readers.numpy_arrays import open_array
from moce.data.readers.parquet import read_parquet_files
from moce.data.readers.sample import Encoded, Label, Sample, as_text, is_image_name
from moce.data.readers.splits import place_samples
from moce.data.readers.storage import local_file
from moce.data.readers.tar_keys import LABEL_SUFFIXES, label_names, usual_parts
from moce.errors import MoceError


def read_folder(root: Path) -> Sequence[Sample]:
    """The images in a folder, named by their path in it. Raises MoceError if there are none."""
    left_out = LeftOut(str(root), HINTS)
    files = _files(root, left_out)
    parts = usual_parts(path.as_posix() for path in files)  # 1.seg.png beside 1.jpg
    for kind in parts.values():
        left_out.add(kind)
    images = [p for p in files if is_image_name(p.name) and p.as_posix() not in parts]
    opener: Callable[[Path], Callable[[], Raster]] = Encoded
    shards = [] if images else [path for path in files if path.suffix == ".parquet"]
    if not images and not shards:  # next to images, .npy files are usually labels or masks
        images = [path for path in files if path.suffix == ".npy"]
        opener = partial(partial, open_array)  # picklable openers
    used = {*(images or shards), *map(Path, parts)}
    left_out.add_others(path.name for path in files if path not in used)
    left_out.report()
    if shards:
        return read_parquet_files([local_file(path) for path in shards])
    if not images:
        known = " ".join(sorted(suffixes()))
        raise MoceError(f"no images in {root} (looked at any depth for {known} .parquet .npy)")
    names = [as_text(path.relative_to(root).as_posix()) for path in images]
    texts = {path.as_posix() for path in files if path.suffix in LABEL_SUFFIXES}
    samples = [
        Sample(name, opener(path), _label_beside(path, texts))
        for name, path in zip(names, images, strict=True)
    ]
    placed = place_samples(list(zip(names, samples, strict=True)), str(root), root.resolve().name)
    entries = find_entries(root, files, names)
    return placed if entries is None else [_as_in(entries, sample) for sample in placed]


def _label_beside(image: Path, texts: set[str]) -> Label | None:
    """The label in a file of the image's name, as in a tar file that was unpacked."""
    name = next((name for name in label_names(image.as_posix()) if name in texts), None)
    if name is None:
        return None
    try:
        return from_text(Path(name).read_text(encoding="utf-8"), Path(name).suffix)
    except (OSError, UnicodeDecodeError):
        return None


def _as_in(entries: dict[str, Entry], sample: Sample) -> Sample:
    """A sample with the label of a table, which has none for images that it does not name."""
    entry = entries.get(sample.id, Entry(None, None))
    return replace(sample, label=entry.label, split=entry.split or sample.split)


def list_images(root: Path, report: bool = False) -> list[Sample]:
    """The images in a folder by their paths in it, without splits and labels; [] if there are none.

    report: say what is left out.
    """
    left_out = LeftOut(str(root), HINTS)
    paths = [path for path in _files(root, left_out) if is_image_name(path.name)]
    if report:
        left_out.report()
    return [Sample(as_text(path.relative_to(root).as_posix()), Encoded(path)) for path in paths]


def _files(root: Path, left_out: LeftOut) -> list[Path]:
    """Files at any depth, sorted, without hidden entries.

    Follows links; visits a folder once, even if links form a loop.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop(0)
        try:
            status = folder.stat()
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except OSError as error:
            if folder == root:
                raise MoceError(f"cannot read {root}: {error.strerror}") from None
            left_out.add_unreadable(folder.relative_to(root).as_posix())
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        inside = folder.relative_to(root)
        children = [c for c in children if not left_out.is_hidden(str(inside / c.name))]
        # Real folders first, so that a path without links names the files.
        folders = [c for c in children if os.path.isdir(c.path)]  # noqa: PTH112 - as below
        pending += [Path(child.path) for child in folders if not child.is_symlink()]
        found += [Path(child.path) for child in children if _is_file(child)]
        pending += [Path(child.path) for child in folders if child.is_symlink()]
    return sorted(found)


def _is_file(child: os.DirEntry[str]) -> bool:
    """True for files and broken links, which are listed as skipped; pipes would block."""
    exists = os.path.exists(child.path)  # noqa: PTH110 - pathlib's raises for a link to itself
    return os.path.isfile(child.path) or (child.is_symlink() and not exists)  # noqa: PTH113
