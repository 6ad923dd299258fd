"""YOLO's text files: images/, labels/ and data.yaml; boxes and polygons in shares of the image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from moce.data.decode import open_encoded
from moce.data.readers.folder import list_images
from moce.data.readers.sample import Sample, as_text
from moce.data.readers.splits import PLAIN_SPLITS, split_of
from moce.dense.readers.objects import Annotation, Picture, assemble
from moce.dense.readers.pairs import image_samples, key_of, visible
from moce.dense.types import DenseSource
from moce.errors import MoceError
from moce.runtime.progress import log

CONFIGS = ("data.yaml", "data.yml", "dataset.yaml")
CLASSES = "classes.txt"
LABELS = "labels"
BOX_NUMBERS = 4


def yolo_config(root: Path) -> Path | None:
    """The file with the classes' names: data.yaml, or classes.txt; None if there is none."""
    names = [*CONFIGS, CLASSES, f"{LABELS}/{CLASSES}"]
    return next((root / name for name in names if (root / name).is_file()), None)


def is_yolo(root: Path, annotations: Path | None = None) -> bool:
    """True if a folder has YOLO's classes and labels."""
    if yolo_config(root) is None:
        return False
    return next(_label_files(root, annotations), None) is not None


def _label_files(root: Path, annotations: Path | None) -> Iterator[Path]:
    folders = [root / LABELS, *root.glob(f"*/{LABELS}")] if annotations is None else [annotations]
    for folder in folders:
        for path in visible(folder.rglob("*.txt"), folder):
            if path.name != CLASSES:
                yield path


def read_yolo(root: Path, annotations: Path | None, max_skipped: float) -> DenseSource:
    """The images and objects of YOLO's folders. Raises MoceError if they cannot be used."""
    file = yolo_config(root)
    assert file is not None
    config = _config(file)
    classes = _names(file, config)
    kinds = ("images", LABELS)
    base = annotations or root
    files = {
        key_of(as_text(path.relative_to(base).as_posix()), kinds): path
        for path in sorted(_label_files(root, annotations))
    }
    pictures, used, unlabeled = [], set(), 0
    for sample, split in _samples(root, config):
        key = key_of(sample.id, kinds)
        path = files.get(key)
        used.add(key)
        unlabeled += path is None
        objects = [] if path is None else _objects(path)
        pictures.append(Picture(sample.id, sample.open, objects, split, relative=True))
    if unlabeled:
        log(
            f"{root}: {unlabeled} of {len(pictures)} images have no labels: taken as without objects"
        )
    if not any(key in config for key in PLAIN_SPLITS):  # then every label belongs to an image
        for path in (files[key] for key in sorted(files.keys() - used)):
            fault = "missing file: no image has these labels"
            name = as_text(path.relative_to(base).as_posix())
            pictures.append(Picture(name, partial(open_encoded, path), fault=fault))
    return assemble(str(root), classes, pictures, max_skipped)


def names_in(file: Path) -> list[str]:
    """The classes that data.yaml or classes.txt names."""
    return _names(file, _config(file))


def _config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = {"names": text.split("\n")} if file.name == CLASSES else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MoceError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise MoceError(f"{file} is not YOLO's: it must hold names, and folders for train and val")
    if file.name == CLASSES:
        content["names"] = [name.strip() for name in content["names"] if name.strip()]
    if "kpt_shape" in content:
        raise MoceError(f"{file} is of keypoints, which moce does not read; give boxes or polygons")
    return content


def _names(file: Path, config: dict[str, Any]) -> list[str]:
    names = config.get("names")
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise MoceError(
            f"{file}: names must list every class once, as a list or as 0: name, 1: name"
        )
    if config.get("nc", len(names)) != len(names):
        raise MoceError(f"{file}: nc is {config['nc']}, but there are {len(names)} names")
    return [str(name) for name in names]


def _samples(root: Path, config: dict[str, Any]) -> Iterator[tuple[Sample, str | None]]:
    """Images and their splits: of the folders and lists that data.yaml names, or by their folders."""
    stated = {key: config[key] for key in PLAIN_SPLITS if config.get(key)}
    if not stated:
        for sample in image_samples(root, report=True):
            folders = PurePosixPath(sample.id).parts[:-1]
            yield sample, next((s for s in map(split_of, folders) if s), None)
        return
    base = root / str(config.get("path") or "")
    base = base if base.is_dir() else root  # written for another computer
    by_id = {sample.id: sample for sample in list_images(root, report=True)}
    for key, places in stated.items():
        for place in places if isinstance(places, list) else [places]:
            for sample in _placed(root, base, str(place), by_id):
                yield sample, PLAIN_SPLITS[key]


def _placed(root: Path, base: Path, place: str, by_id: dict[str, Sample]) -> Iterator[Sample]:
    """The images of a folder, or of a list of them, that data.yaml names."""
    path = base / place
    if not path.exists():
        path = base / place.removeprefix("../")  # as some exports write it
    if path.is_dir():
        start = _inside(path, root)
        yield from (s for name, s in by_id.items() if not start or name.startswith(f"{start}/"))
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise MoceError(f"no images of data.yaml: {path} is neither a folder nor a list") from None
    for line in filter(None, map(str.strip, lines)):
        name = _inside(path.parent / line, root)
        yield by_id.get(name) or Sample(name, partial(open_encoded, root / name))


def _inside(path: Path, root: Path) -> str:
    """A path relative to the folder of DATA. Raises MoceError if it leads out of it."""
    try:
        name = path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise MoceError(
            f"data.yaml names {path}, outside of {root}; give the folder of both"
        ) from None
    return "" if name == "." else as_text(name)


def _objects(path: Path) -> list[Annotation]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [Annotation(fault=f"malformed labels: {type(error).__name__} in {path.name}")]
    return [_object(line) for line in lines if line.strip()]


def _object(line: str) -> Annotation:
    """CLASS CENTER_X CENTER_Y WIDTH HEIGHT, or CLASS X Y X Y X Y ..., all but the class in 0..1."""
    words = line.split()
    try:
        label, numbers = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        return Annotation(fault=f"malformed line: {line[:60]}")
    if len(numbers) == BOX_NUMBERS:
        x, y, width, height = numbers
        return Annotation(label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    if len(numbers) > BOX_NUMBERS and len(numbers) % 2 == 0:
        return Annotation(label, None, [numbers])
    return Annotation(fault=f"malformed line: {len(numbers)} numbers after the class")
