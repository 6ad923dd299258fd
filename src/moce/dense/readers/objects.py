"""From what a file says about objects to checked boxes and masks: the same rules for every format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from moce.data.decode import Raster, upright_size
from moce.data.readers.sample import error_line
from moce.data.run_ahead import run_ahead
from moce.dense import rle
from moce.dense.types import DenseSample, DenseSource, Instances
from moce.errors import MoceError
from moce.runtime.progress import log, meter
from moce.runtime.system import worker_threads

Size = tuple[int, int]
T = TypeVar("T")
ROUNDING = 1.0  # pixels that a box may reach beyond the image without being cut
FEWEST_NUMBERS = 6  # of a polygon: three corners
AHEAD = 64
BAR_AFTER = 2.0  # seconds


@dataclass
class Annotation:
    """An object as its file states it.

    label: index of the class, or what is written instead of a known one. box: x1, y1, x2, y2, None
    if it follows from the mask. mask: polygons [[x, y, ...], ...], or COCO's {"size", "counts"}.
    fault: why the file's entry cannot be understood.
    """

    label: int | str = ""
    box: Sequence[float] | None = None
    mask: Any = None
    crowd: bool = False
    area: float | None = None
    fault: str | None = None


@dataclass
class Picture:
    """An image and its objects as files state them.

    size: (h, w) if stated. relative: boxes and polygons are in shares of width and height. fault:
    why the image cannot be used.
    """

    id: str
    open: Callable[[], Raster]
    annotations: list[Annotation] = field(default_factory=list)
    split: str | None = None
    size: Size | None = None
    image_id: int | None = None
    relative: bool = False
    fault: str | None = None


@dataclass(frozen=True)
class Packed:
    """The checked objects of one image; polygons become masks only when they are needed."""

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray | None
    masks: tuple[Any, ...] | None  # an RLE, or a tuple of polygons
    size: Size

    def instances(self) -> Instances:
        masks = self.masks
        if masks is not None:
            masks = tuple(
                mask if isinstance(mask, dict) else rle.from_polygons(mask, self.size)
                for mask in masks
            )
        return Instances(self.boxes, self.classes, masks, self.crowd, self.areas)


def assemble(
    name: str,
    classes: list[str],
    pictures: list[Picture],
    max_skipped: float,
    category_ids: list[int] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> DenseSource:
    """The source of the pictures whose files and objects hold what is asked of them.

    skipped: annotations that belong to no picture. Raises MoceError if no picture is left, or more
    than the share `max_skipped` of the images or of the annotations cannot be used.
    """
    rle.mask_library()  # its metric is needed after training; refused now if it is missing
    has_masks = masks_prevail(name, pictures)
    source = DenseSource(name, "detect", classes, [], has_masks, category_ids=category_ids)
    bad = list(skipped)
    total = len(bad) + sum(len(picture.annotations) for picture in pictures)
    sizes = in_threads("check images", [partial(size_or_fault, each) for each in pictures])
    for picture, found in zip(pictures, sizes, strict=True):
        if isinstance(found, str):
            source.skipped.append((picture.id, found))
            continue
        packed = _pack(picture, found, source, bad)
        source.samples.append(
            DenseSample(
                picture.id,
                picture.open,
                packed.instances,
                picture.split,
                found,
                picture.image_id,
            )
        )
    raise_above_share(name, "images", source.skipped, len(pictures), max_skipped)
    raise_above_share(name, "annotations", bad, total, max_skipped)
    source.skipped += bad
    if source.clipped:
        first = source.clipped[0]
        log(f"{name}: {len(source.clipped)} boxes reach beyond their image and are cut ({first})")
    return source


def masks_prevail(name: str, pictures: Sequence[Picture]) -> bool:
    """True if most objects have masks; then those without cannot be used. Logs masks left unused."""
    single = [a for p in pictures for a in p.annotations if not a.crowd and a.fault is None]
    masked = sum(bool(annotation.mask) for annotation in single)
    if masked * 2 > len(single):
        return True
    if masked:
        log(f"{name}: {masked} of {len(single)} objects have masks; too few, only boxes are used")
    return False


def raise_above_share(
    name: str, what: str, bad: Sequence[tuple[str, str]], total: int, most: float
) -> None:
    """Log what is skipped; raise MoceError, with the most frequent reason, if it is too much."""
    if not total:
        if what == "images":
            raise MoceError(f"no images in {name}")
        return
    if not bad:
        return
    kind, times = Counter(reason.split(":")[0] for _, reason in bad).most_common(1)[0]
    first, reason = next(each for each in bad if each[1].split(":")[0] == kind)
    cause = f"{times} x {kind} (as {first}: {reason.removeprefix(kind).strip(': ')})"
    cause = cause.replace(": )", ")")
    if len(bad) > most * total or (what == "images" and len(bad) == total):
        raise MoceError(
            f"{len(bad)} of the {total} {what} of {name} cannot be used: {cause}; fix them, or "
            f"allow a larger share than {most:g} with --max-skipped"
        )
    log(f"{name}: skipped {len(bad)} of {total} {what}: {cause}")


# --- images -------------------------------------------------------------------------------------------


def in_threads(what: str, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all jobs, in their order. A progress bar shows if they take long."""
    threads = worker_threads()
    results: list[T] = []
    with (
        meter(what, len(jobs), wait=BAR_AFTER) as progress,
        closing(run_ahead(jobs, threads, AHEAD * threads)) as found,
    ):
        for each in found:
            results.append(each)
            progress.advance()
    return results


def size_or_fault(picture: Picture) -> Size | str:
    """(h, w) of the upright image, or why it cannot be used; reads only the start of its file."""
    if picture.fault is not None:
        return picture.fault
    try:
        image = picture.open()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            size = upright_size(image)
    except FileNotFoundError:
        return "missing file"
    except Exception as error:  # decoders raise errors of any type
        return error_line(error)
    if picture.size is not None and picture.size != size:
        return (
            f"image of another size: annotated as {picture.size[1]} x {picture.size[0]}, but "
            f"upright {size[1]} x {size[0]}"
        )
    return size


# --- objects ------------------------------------------------------------------------------------------


def _pack(picture: Picture, size: Size, source: DenseSource, bad: list[tuple[str, str]]) -> Packed:
    boxes, classes, crowd, areas, masks = [], [], [], [], []
    for number, annotation in enumerate(picture.annotations, 1):
        name = f"{picture.id}, object {number}"
        try:
            label = _label(annotation, len(source.classes))
            mask = _mask(annotation, size, picture.relative) if source.has_masks else None
            box = _box(annotation, mask, size, picture.relative)
            area = _area(annotation)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            bad.append((name, str(error) or type(error).__name__))
            continue
        inside = box.clip(0, [size[1], size[0]] * 2)
        if np.abs(inside - box).max() > ROUNDING:
            source.clipped.append(name)
            box = inside
        boxes.append(box)
        classes.append(label)
        crowd.append(annotation.crowd)
        areas.append(area)
        masks.append(mask)
    return Packed(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(crowd, bool),
        np.array(areas, np.float64) if areas and None not in areas else None,
        tuple(masks) if source.has_masks else None,
        size,
    )


def _label(annotation: Annotation, num_classes: int) -> int:
    if annotation.fault is not None:
        raise ValueError(annotation.fault)
    if isinstance(annotation.label, str) or not 0 <= annotation.label < num_classes:
        raise ValueError(f"unknown class: {annotation.label}")
    return annotation.label


def _box(annotation: Annotation, mask: Any, size: Size, relative: bool) -> np.ndarray:
    """[4] float64 in pixels. Raises ValueError if it covers nothing of the image."""
    height, width = size
    if annotation.box is None:
        return _box_of(mask, annotation.mask, size, relative)
    box = np.array(annotation.box, np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"not a box: {_short(annotation.box)}")
    if relative:
        box *= [width, height, width, height]
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"box of no area: {_short(box)}")
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"box outside the image: {_short(box)} in {width} x {height}")
    return box


def _box_of(mask: Any, written: Any, size: Size, relative: bool) -> np.ndarray:
    """The box around a mask; around its polygons if masks are not used."""
    if mask is None:
        mask = _polygons(written, size, relative)
    if isinstance(mask, dict):
        box = rle.boxes([mask])[0].astype(np.float64)
    else:
        points = np.concatenate(mask).reshape(-1, 2)
        box = np.concatenate([points.min(0), points.max(0)])
    return _box(Annotation(box=box.tolist()), None, size, False)


def _mask(annotation: Annotation, size: Size, relative: bool) -> Any:
    """An RLE, or a tuple of polygons in pixels. Raises ValueError if there is none, or a damaged one."""
    if not annotation.mask:
        raise ValueError("no mask")
    if isinstance(annotation.mask, dict):
        return rle.checked(annotation.mask, size)
    return _polygons(annotation.mask, size, relative)


def _polygons(written: Any, size: Size, relative: bool) -> tuple[np.ndarray, ...]:
    polygons = []
    for points in written:
        polygon = np.array(points, np.float64)
        if polygon.ndim != 1 or len(polygon) < FEWEST_NUMBERS or len(polygon) % 2:
            raise ValueError("not a polygon: its corners are not three or more pairs")
        if not np.isfinite(polygon).all():
            raise ValueError("not a polygon: its corners are not finite")
        if relative:
            polygon *= np.tile([size[1], size[0]], len(polygon) // 2)
        polygons.append(polygon)
    return tuple(polygons)


def _area(annotation: Annotation) -> float | None:
    area = annotation.area
    if area is None:
        return None
    if not (math.isfinite(area) and area >= 0):
        raise ValueError(f"not an area: {area}")
    return float(area)


def _short(numbers: Any) -> str:
    try:
        return " ".join(f"{float(number):g}" for number in numbers)[:60]
    except (TypeError, ValueError):
        return repr(numbers)[:60]
