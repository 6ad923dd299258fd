"""Pascal VOC's XML: Annotations/, JPEGImages/ and ImageSets/, or XML files beside their images.

The instance masks in SegmentationObject/ are used if most objects have one. In VOC as downloaded a
quarter has: `annotations` names that folder to take its images alone.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from moce.data.decode import open_encoded
from moce.data.readers.sample import Sample, as_text, error_line
from moce.data.readers.splits import PLAIN_SPLITS, split_of
from moce.dense import rle
from moce.dense.images import mask_values
from moce.dense.readers.objects import Annotation, Picture, assemble, in_threads
from moce.dense.readers.pairs import IMAGE_FOLDERS, image_samples, key_of, visible
from moce.dense.types import IGNORE, RLE, DenseSource
from moce.errors import MoceError
from moce.runtime.progress import log

XML_FOLDER = "Annotations"
MASK_FOLDER = "SegmentationObject"  # value n of a mask is the n-th object of the XML, 255 a border
KINDS = (XML_FOLDER, *IMAGE_FOLDERS)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_files(root: Path, annotations: Path | None = None) -> list[Path]:
    """The XML files of a folder: in Annotations/, or beside the images; or those of `annotations`.

    Of a folder of instance masks: the XML files of its images.
    """
    if annotations is not None and annotations.name == MASK_FOLDER:
        masked = _mask_files(annotations)
        return [path for path in voc_files(root) if path.stem in masked]
    if annotations is not None:
        return visible(annotations.rglob("*.xml"), annotations) if annotations.is_dir() else []
    folder = root / XML_FOLDER
    if folder.is_dir():
        return visible(folder.rglob("*.xml"), folder)
    # No deeper: a folder of a million images of classes is not searched.
    patterns = ("*.xml", "*/*.xml", f"*/{XML_FOLDER}/*.xml")
    return visible((path for pattern in patterns for path in root.glob(pattern)), root)


def listed_in_sets(root: Path, kind: str) -> dict[str, str]:
    """The split of every image that ImageSets/KIND/{train,val,test}.txt lists; {} without such files."""
    splits: dict[str, str] = {}
    for file in visible((root / "ImageSets" / kind).glob("*.txt"), root):
        if file.stem not in PLAIN_SPLITS:
            continue
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MoceError(f"cannot read {file}: {error}") from None
        for line in filter(None, map(str.strip, lines)):
            name = line.split()[0]
            if splits.setdefault(name, PLAIN_SPLITS[file.stem]) != PLAIN_SPLITS[file.stem]:
                raise MoceError(f"{name} is in two lists of {file.parent}")
    return splits


def read_voc(root: Path, annotations: Path | None, max_skipped: float) -> DenseSource:
    """The images and objects of VOC's XML; difficult objects become crowds, which do not count.

    Coordinates are taken as VOC's, which count from 1, unless one of the source is 0. Raises
    MoceError if the files cannot be used.
    """
    files = voc_files(root, annotations)
    by_masks = annotations is not None and annotations.name == MASK_FOLDER
    base = root if annotations is None or by_masks else annotations
    pictures = list(_pictures(root, base, files, "Segmentation" if by_masks else "Main"))
    _add_masks(pictures, root, annotations if by_masks and annotations else root / MASK_FOLDER)
    found = [a for picture in pictures for a in picture.annotations if a.box is not None]
    if not any(0 <= value < 1 for a in found for value in (a.box or ())[:2]):
        for annotation in found:
            x1, y1, x2, y2 = annotation.box or ()
            annotation.box = (x1 - 1, y1 - 1, x2, y2)
    elif found:
        log(f"{root}: a box starts at 0, so coordinates are taken to count from 0, not 1 as VOC's")
    names = {a.label for picture in pictures for a in picture.annotations if a.fault is None}
    classes = sorted(map(str, names))
    number = {name: index for index, name in enumerate(classes)}
    for picture in pictures:
        for annotation in picture.annotations:
            annotation.label = number.get(str(annotation.label), "")
    return assemble(str(root), classes, pictures, max_skipped)


def _mask_files(folder: Path) -> dict[str, Path]:
    """The PNG files of a folder of instance masks by the names of their images; {} if there is none."""
    return {path.stem: path for path in visible(folder.glob("*.[pP][nN][gG]"), folder)}


def _add_masks(pictures: list[Picture], root: Path, folder: Path) -> None:
    """Give the objects their masks, if most images have one; what does not fit is a fault."""
    files = _mask_files(folder)
    masked = [(p, files[name]) for p in pictures if (name := PurePosixPath(p.id).stem) in files]
    if len(masked) * 2 <= len(pictures):
        if masked:
            log(
                f"{root}: {len(masked)} of {len(pictures)} images have masks of objects; too few, only "
                f"boxes are used (--annotations {folder} takes these images alone)"
            )
        return
    jobs = [partial(_object_masks, file, len(picture.annotations)) for picture, file in masked]
    for (picture, _), found in zip(masked, in_threads("read masks", jobs), strict=True):
        if isinstance(found, str):
            picture.fault = picture.fault or found
            continue
        for annotation, mask in zip(picture.annotations, found, strict=True):
            annotation.mask = mask


def _object_masks(file: Path, count: int) -> list[RLE | None] | str:
    """The mask of every object, None for those without a pixel; or why they cannot be used."""
    try:
        values = mask_values(open_encoded(file))
    except Exception as error:  # decoders raise errors of any type
        return f"damaged mask: {error_line(error)}"
    strange = sorted(set(np.unique(values).tolist()) - {*range(count + 1), IGNORE})
    if strange:
        return f"mask of other objects: value {strange[0]} in {file.name}, {count} in the XML"
    present = [values == number for number in range(1, count + 1)]
    found = rle.encode(np.stack(present)) if present else []
    return [mask if pixels.any() else None for mask, pixels in zip(found, present, strict=True)]


def _pictures(root: Path, base: Path, files: list[Path], sets: str) -> Iterator[Picture]:
    samples = image_samples(root, report=True)
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(key_of(sample.id, KINDS), []).append(sample)
    by_name = {PurePosixPath(sample.id).name: sample for sample in samples}
    splits = listed_in_sets(root, sets)
    unlisted = 0
    for path in files:
        name = as_text(path.relative_to(base).as_posix())
        key = key_of(name, KINDS)
        if splits and key not in splits:
            unlisted += 1
            continue
        split = splits.pop(key, None) or next(
            filter(None, map(split_of, name.split("/")[:-1])), None
        )
        yield _picture(path, name, split, by_key.get(key, []), by_name)
    if unlisted:
        log(f"{root}: {unlisted} images are in none of the lists of ImageSets/{sets}")
    for key in splits:
        fault = "missing file: no XML of an image that ImageSets lists"
        yield Picture(key, partial(open_encoded, root / key), fault=fault)


def _picture(
    path: Path,
    name: str,
    split: str | None,
    beside: list[Sample],
    by_name: dict[str, Sample],
) -> Picture:
    try:
        tree = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError) as error:
        return Picture(name, partial(open_encoded, path), fault=f"malformed XML: {error}")
    stated = PurePosixPath((tree.findtext("filename") or "").strip().replace("\\", "/")).name
    named = [sample for sample in beside if PurePosixPath(sample.id).name == stated]
    sample = next(iter([*named, *beside]), None) or by_name.get(stated)
    if sample is None:
        return Picture(
            name, partial(open_encoded, path), fault="missing file: no image of this XML"
        )
    size = None
    try:
        height, width = (int(tree.findtext(f"size/{side}") or 0) for side in ("height", "width"))
        size = (height, width) if height and width else None
    except ValueError:
        pass  # the image itself tells
    return Picture(sample.id, sample.open, [_object(o) for o in tree.iter("object")], split, size)


def _object(entry: ElementTree.Element) -> Annotation:
    label = (entry.findtext("name") or "").strip()
    if not label:
        return Annotation(fault="unknown class: an object without a name")
    try:
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{corner}") or "") for corner in CORNERS)
    except ValueError:
        return Annotation(fault="malformed annotation: bndbox needs xmin, ymin, xmax and ymax")
    return Annotation(
        label, (x1, y1, x2, y2), crowd=(entry.findtext("difficult") or "").strip() == "1"
    )
