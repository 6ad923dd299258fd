"""Folders of image files, at any depth; folders of parquet or .npy files if there are no others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from moce.data.decode import Raster
from moce.data.readers.numpy_arrays import open_array
from moce.data.readers.parquet import read_parquet_files
from moce.data.readers.sample import SUFFIXES, Encoded, Sample, as_text, from_path, is_image_name
from moce.data.readers.storage import local_file
from moce.errors import MoceError


def read_folder(root: Path) -> Sequence[Sample]:
    """The images in a folder, named by their path in it. Raises MoceError if there are none."""
    files = _files(root)
    images = [path for path in files if is_image_name(path.name)]
    opener: Callable[[Path], Callable[[], Raster]] = Encoded
    shards = [path for path in files if path.suffix == ".parquet"]
    if shards and not images:
        return read_parquet_files([local_file(path) for path in shards])
    if not images:  # next to images, .npy files are usually labels or masks
        images = [path for path in files if path.suffix == ".npy"]
        opener = partial(partial, open_array)  # picklable openers
    if not images:
        suffixes = " ".join(sorted(SUFFIXES))
        raise MoceError(f"no images in {root} (looked at any depth for {suffixes} .parquet .npy)")
    return [from_path(as_text(path.relative_to(root).as_posix()), opener(path)) for path in images]


def _files(root: Path) -> list[Path]:
    """Files at any depth, sorted. Follows links; visits a folder once, even if links form a loop."""
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
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
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
