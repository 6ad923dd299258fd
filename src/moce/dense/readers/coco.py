"""COCO JSON: boxes, polygons, packed masks and crowds, in the folders of COCO as downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moce.data.decode import open_encoded
from moce.data.readers.sample import as_text
from moce.data.readers.splits import split_of
from moce.dense.readers.objects import Annotation, Picture, assemble
from moce.dense.readers.pairs import visible
from moce.dense.types import DenseSource
from moce.errors import MoceError
from moce.runtime.progress import log

INSTANCES = "instances_"
BESIDE = "_annotations.coco.json"  # in every split's folder, beside its images


@dataclass(frozen=True)
class Part:
    """An annotation file, the folder of its images, and the split that its name states."""

    file: Path
    images: Path
    split: str | None


def coco_parts(root: Path, annotations: Path | None = None) -> list[Part]:
    """The annotation files of a folder, or those that `annotations`, a file or folder, names."""
    if annotations is not None:
        inside = annotations.is_dir()
        files = visible(annotations.glob("*.json"), annotations) if inside else [annotations]
        return [_part(root, file) for file in files]
    beside = visible([*root.glob(f"*/{BESIDE}"), *root.glob(BESIDE)], root)
    if beside:
        return [Part(file, file.parent, split_of(file.parent.name)) for file in beside]
    folder = root / "annotations"
    patterns = (f"{INSTANCES}*.json", "*.json")
    found = [visible(folder.glob(pattern), folder) for pattern in patterns]
    found += [visible(root.glob(pattern), root) for pattern in (patterns[0], "annotations.json")]
    files = next(filter(None, found), [])
    return [_part(root, file) for file in files]


def _part(root: Path, file: Path) -> Part:
    """The images of instances_NAME.json are in NAME/, images/NAME/, images/ or the folder itself."""
    name = file.stem.removeprefix(INSTANCES)
    places = (root / name, root / "images" / name)
    images = next((place for place in places if place.is_dir()), None)
    if images is None and file.stem.startswith(INSTANCES) and split_of(name):
        images = places[0]  # COCO's own folder, which may not be downloaded
    if images is None or not images.is_dir():
        common = root / "images"
        images = images or (common if common.is_dir() else root)
    return Part(file, images, split_of(name))


def read_coco(root: Path, annotations: Path | None, max_skipped: float) -> DenseSource:
    """The images and objects of COCO JSON. Raises MoceError if they cannot be used."""
    contents, found = [], coco_parts(root, annotations)
    for part in found:
        if not part.images.is_dir():
            log(f"no folder {part.images}: {part.file.name} is left out")
            continue
        contents.append((part, _load(part.file)))
    if not contents:
        raise MoceError(f"no images for the annotations of {root}: no folder {found[0].images}")
    names = _categories(contents)
    number = {category: index for index, category in enumerate(names)}
    pictures: list[Picture] = []
    strays: list[tuple[str, str]] = []
    for part, content in contents:
        pictures += _pictures(root, part, content, number, strays)
    ids = list(number)
    return assemble(str(root), list(names.values()), pictures, max_skipped, ids, strays)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise MoceError(f"cannot read {file}: {reason}") from None
    needed = ("images", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in needed):
        raise MoceError(
            f"{file} is not COCO JSON: it must hold the lists images, annotations and categories"
        )
    if not isinstance(content.setdefault("annotations", []), list):
        raise MoceError(f"{file} is not COCO JSON: annotations must be a list")
    return content


def _categories(contents: list[tuple[Part, dict[str, Any]]]) -> dict[int, str]:
    """The classes' names by COCO's number, in its order. Raises MoceError if files disagree."""
    names: dict[int, str] = {}
    for part, content in contents:
        for entry in content["categories"]:
            try:
                number, name = entry["id"], entry["name"]
            except (TypeError, KeyError):
                raise MoceError(f"{part.file}: every category needs an id and a name") from None
            if not isinstance(number, int) or names.setdefault(number, str(name)) != str(name):
                raise MoceError(
                    f"{part.file}: category {number} is {name} here, and {names.get(number)} before"
                )
    if not names:
        raise MoceError(f"{contents[0][0].file} lists no categories")
    repeated = sorted({n for n in names.values() if list(names.values()).count(n) > 1})
    if repeated:
        raise MoceError(f"{contents[0][0].file}: two categories are named {repeated[0]}")
    return dict(sorted(names.items()))


def _pictures(
    root: Path,
    part: Part,
    content: dict[str, Any],
    number: dict[int, int],
    strays: list[tuple[str, str]],
) -> Iterator[Picture]:
    by_id: dict[Any, Picture] = {}
    listed = set()
    for place, entry in enumerate(content["images"], 1):
        name = f"{part.file.name}, image {place}"
        try:
            image_id, file = entry["id"], part.images / entry["file_name"]
            size = (int(entry["height"]), int(entry["width"])) if "height" in entry else None
        except (TypeError, KeyError, ValueError):
            reason = "not an image: it needs id, file_name, height and width"
            yield Picture(name, partial(open_encoded, part.images), fault=reason)
            continue
        if not isinstance(image_id, int | str) or image_id in by_id or file in listed:
            reason = f"listed twice: id {image_id}, {entry['file_name']}"
            yield Picture(name, partial(open_encoded, file), fault=reason)
            continue
        listed.add(file)
        known = image_id if isinstance(image_id, int) else None
        opened = partial(open_encoded, file)
        by_id[image_id] = Picture(_id(file, root), opened, [], part.split, size, known)
    for place, entry in enumerate(content["annotations"], 1):
        try:
            picture = by_id[entry["image_id"]]
        except (TypeError, KeyError):
            strays.append(
                (f"{part.file.name}, annotation {place}", "of an image that is not listed")
            )
            continue
        picture.annotations.append(_annotation(entry, number))
    yield from by_id.values()


def _id(file: Path, root: Path) -> str:
    return as_text((file.relative_to(root) if file.is_relative_to(root) else file).as_posix())


def _annotation(entry: dict[str, Any], number: dict[int, int]) -> Annotation:
    try:
        category, box, mask = entry["category_id"], entry.get("bbox"), entry.get("segmentation")
        if box is not None:
            x, y, width, height = (float(value) for value in box)
            box = (x, y, x + width, y + height)
        elif not mask:
            return Annotation(fault="no box")
        label = number.get(category, str(category))
        area = None if entry.get("area") is None else float(entry["area"])
        return Annotation(label, box, mask, bool(entry.get("iscrowd", 0)), area)
    except (TypeError, ValueError, KeyError) as error:
        return Annotation(fault=f"malformed annotation: {type(error).__name__} {error}")
