"""Where data sets of semantic masks keep images, masks and classes, and what their values mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from moce.data.readers.folder import list_images
from moce.data.readers.sample import Sample
from moce.data.readers.splits import split_of
from moce.dense.readers.pairs import image_samples, key_of, visible
from moce.dense.readers.voc import MASK_FOLDER as OBJECT_MASKS
from moce.dense.readers.voc import listed_in_sets
from moce.dense.readers.yolo import names_in, yolo_config
from moce.dense.types import IGNORE
from moce.errors import MoceError

UNKNOWN = -1  # in a table of values: no class has this value
LOOKED_AT = 100  # files, to tell whether a folder holds masks
VALUES = 256  # of a mask of 8 bits
MASK_FOLDERS = ("masks", "annotations", "labels", "SegmentationClass", "gtFine")

VOC_NAMES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog
horse motorbike person pottedplant sheep sofa train tvmonitor"""
CITYSCAPES_NAMES = """road sidewalk building wall fence pole traffic_light traffic_sign vegetation
terrain sky person rider car truck bus train motorcycle bicycle"""
VOC_CLASSES = VOC_NAMES.split()
CITYSCAPES_CLASSES = [name.replace("_", " ") for name in CITYSCAPES_NAMES.split()]
# The labelIds of these classes; all other ids up to 33 do not count.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_MOST = 33
ADE_INFO = "objectInfo150.txt"


@dataclass(frozen=True)
class Pair:
    """An image and its mask; one of them is None if the file is missing."""

    id: str
    image: Sample | None
    mask: Sample | None
    split: str | None


@dataclass
class Layout:
    """classes: None if no file names them. table: [256] int64, class, `IGNORE` or `UNKNOWN` of a value."""

    pairs: list[Pair]
    classes: list[str] | None
    table: np.ndarray


def find_layout(root: Path, annotations: Path | None = None) -> Layout | None:
    """The images and masks of a folder; None if it has no masks."""
    if annotations is not None:
        of_objects = annotations.name == OBJECT_MASKS
        return _plain(root, annotations) if _has_png(annotations) and not of_objects else None
    if (root / ADE_INFO).is_file() and (root / "annotations").is_dir():
        return _ade20k(root)
    if (root / "SegmentationClass").is_dir():
        return _voc(root)
    if (root / "gtFine").is_dir():
        return _cityscapes(root)
    return _plain(root, None)


def table_of(values: dict[int, int]) -> np.ndarray:
    """[256] int64: the class of each value; 255 is `IGNORE`, all others `UNKNOWN`."""
    table = np.full(VALUES, UNKNOWN, np.int64)
    table[IGNORE] = IGNORE
    table[list(values)] = list(values.values())
    return table


def _ade20k(root: Path) -> Layout:
    """ADEChallengeData2016: value 0 is any other object, which does not count; 1 to 150 are classes."""
    try:
        lines = (root / ADE_INFO).read_text(encoding="utf-8-sig").splitlines()
        classes = [line.split("\t")[-1].strip() for line in lines[1:] if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MoceError(f"cannot read {root / ADE_INFO}: {error}") from None
    classes = _distinct(classes)
    table = table_of({0: IGNORE} | {value + 1: value for value in range(len(classes))})
    pairs = _matched(image_samples(root), _masks(root, "annotations"))
    return Layout(list(pairs), classes, table)


def _distinct(names: list[str]) -> list[str]:
    """Names that occur twice get a number: ADE20K has two classes 'screen'."""
    return [n if names.index(n) == i else f"{n} #{i + 1}" for i, n in enumerate(names)]


def _voc(root: Path) -> Layout:
    splits = listed_in_sets(root, "Segmentation")
    pairs = list(_matched(image_samples(root), _masks(root, "SegmentationClass"), unmasked=False))
    stem = {pair: PurePosixPath(pair.id).stem for pair in pairs}
    if splits:
        found = set(stem.values())
        pairs = [Pair(p.id, p.image, p.mask, splits[stem[p]]) for p in pairs if stem[p] in splits]
        pairs += [Pair(name, None, None, splits[name]) for name in splits if name not in found]
    return Layout(pairs, VOC_CLASSES, table_of({v: v for v in range(len(VOC_CLASSES))}))


def _cityscapes(root: Path) -> Layout:
    """gtFine's labelIds, whose other classes do not count, or trainIds, if only these are there."""
    masks = _masks(root, "gtFine")
    by_ids = dict.fromkeys(range(CITYSCAPES_MOST + 1), IGNORE)
    by_ids |= {value: number for number, value in enumerate(CITYSCAPES_IDS)}
    ending, table = "_gtFine_labelIds", table_of(by_ids)
    chosen = [m for m in masks if PurePosixPath(m.id).stem.endswith(ending)]
    if not chosen:
        ending, table = (
            "_gtFine_labelTrainIds",
            table_of({n: n for n in range(len(CITYSCAPES_IDS))}),
        )
        chosen = [m for m in masks if PurePosixPath(m.id).stem.endswith(ending)]
    pairs = _matched(image_samples(root), chosen, "_leftImg8bit", ending)
    return Layout(list(pairs), CITYSCAPES_CLASSES, table)


def _plain(root: Path, annotations: Path | None) -> Layout | None:
    """images/ beside masks/, annotations/ or labels/, in every split's folder or with splits in them."""
    if annotations is not None:
        masks = [m for m in list_images(annotations) if m.id.lower().endswith(".png")]
        images = image_samples(root)
    else:
        kind = _mask_folder(root)
        if kind is None:
            return None
        masks = _masks(root, kind)
        known = {mask.id for mask in masks}
        images = [sample for sample in image_samples(root) if sample.id not in known]
    # Predictions have their classes.txt beside the folder of masks.
    classes = class_names(root)
    if classes is None and annotations is not None:
        classes = class_names(annotations.parent)
    number = IGNORE if classes is None else len(classes)
    table = table_of({value: value for value in range(number)})
    return Layout(list(_matched(images, masks)), classes, table)


def _mask_folder(root: Path) -> str | None:
    """The name of the folder of PNG masks beside a folder images, in the root or in those of splits."""
    for base in (root, *(root.glob("*/"))):
        for kind in MASK_FOLDERS:
            if (base / "images").is_dir() and _has_png(base / kind):
                return kind
    return None


def _has_png(folder: Path) -> bool:
    return bool(visible(islice(folder.rglob("*.[pP][nN][gG]"), LOOKED_AT), folder))


def class_names(root: Path) -> list[str] | None:
    """The names in classes.txt, one a line, or in data.yaml; the line's number, from 0, is the value."""
    file = yolo_config(root)
    return None if file is None else names_in(file)


def _masks(root: Path, kind: str) -> list[Sample]:
    return [s for s in _in(list_images(root), kind) if s.id.lower().endswith(".png")]


def _in(samples: Sequence[Sample], kind: str) -> list[Sample]:
    return [sample for sample in samples if kind in PurePosixPath(sample.id).parts[:-1]]


def _matched(
    images: Sequence[Sample],
    masks: Sequence[Sample],
    image_ending: str = "",
    mask_ending: str = "",
    unmasked: bool = True,
) -> Iterator[Pair]:
    """Images and masks of the same path but for its kind. unmasked: images without mask are listed, too."""
    kinds = (*MASK_FOLDERS, "JPEGImages", "images", "leftImg8bit")
    by_key = {key_of(mask.id, kinds, mask_ending): mask for mask in masks}
    for image in images:
        key = key_of(image.id, kinds, image_ending)
        mask = by_key.pop(key, None)
        if mask is not None or unmasked:
            yield Pair(image.id, image, mask, _split(image.id))
    for mask in by_key.values():
        yield Pair(mask.id, None, mask, _split(mask.id))


def _split(name: str) -> str | None:
    return next(filter(None, map(split_of, PurePosixPath(name).parts[:-1])), None)
