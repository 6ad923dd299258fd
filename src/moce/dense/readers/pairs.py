"""Images and the files beside them that describe them: matched by their path without its kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from moce.data.readers.folder import read_folder
from moce.data.readers.sample import Sample
from moce.data.readers.splits import PLAIN_SPLITS

IMAGE_FOLDERS = ("JPEGImages", "images", "leftImg8bit")


def image_samples(root: Path) -> Sequence[Sample]:
    """The images of a folder: those in its JPEGImages, images or leftImg8bit folders if there are any.

    Raises MoceError without images.
    """
    samples = read_folder(root)
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


def split_of(name: str) -> str | None:
    """The split that a folder or file is named after: train of train2017, val of valid or val_v2."""
    word = re.fullmatch(r"([a-z]+)[\d_.-]*(v\d+)?", name.lower())
    return PLAIN_SPLITS.get(word[1]) if word else None
