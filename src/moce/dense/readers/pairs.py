"""Images and the files beside them that describe them: matched by their path without its kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from moce.data.readers.folder import list_images
from moce.data.readers.left_out import hidden_part
from moce.data.readers.sample import Sample

IMAGE_FOLDERS = ("JPEGImages", "images", "leftImg8bit")


def image_samples(root: Path, report: bool = False) -> list[Sample]:
    """The images of a folder: those in its JPEGImages, images or leftImg8bit folders if there are any.

    Without splits, which every format states in its own way. report: say what is left out.
    """
    samples = list_images(root, report)
    for kind in IMAGE_FOLDERS:
        chosen = [sample for sample in samples if kind in PurePosixPath(sample.id).parts[:-1]]
        if chosen:
            return chosen
    return samples


def key_of(name: str, kinds: Iterable[str], ending: str = "") -> str:
    """A relative path without its suffix, an ending of its name, and the folder that states its kind.

    images/train/a.jpg and labels/train/a.txt, like train/images/a.jpg, are train/a.
    """
    path = PurePosixPath(name)
    folders = list(path.parts[:-1])
    place = next((n for n in reversed(range(len(folders))) if folders[n] in kinds), None)
    if place is not None:
        del folders[place]
    return "/".join([*folders, path.stem.removesuffix(ending)])


def visible(paths: Iterable[Path], root: Path) -> list[Path]:
    """Files below `root`, sorted, without hidden and system entries, as `read_folder` leaves them out."""
    return sorted(p for p in paths if hidden_part(p.relative_to(root).as_posix()) is None)
