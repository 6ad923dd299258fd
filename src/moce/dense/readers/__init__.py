"""One file per format of boxes and masks; `read_dense` finds the one that DATA needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from moce.config import expand
from moce.data.readers.factory import sources_of
from moce.dense.readers.coco import coco_parts, read_coco
from moce.dense.readers.columns import find_columns, read_columns
from moce.dense.readers.layouts import find_layout
from moce.dense.readers.masks import read_masks
from moce.dense.readers.voc import read_voc, voc_files
from moce.dense.readers.yolo import CONFIGS, is_yolo, read_yolo
from moce.dense.types import DenseSource, DenseTask
from moce.errors import MoceError

ACCEPTED = (
    "COCO JSON in annotations/, YOLO's labels/ and data.yaml, VOC's Annotations/, images/ and masks/, "
    "or a table with a column objects or annotation"
)
Read = Callable[[], DenseSource]


def read_dense(
    data: str,
    task: DenseTask | None,
    annotations: Path | None = None,
    max_skipped: float = 0.5,
    ignore_index: int | None = None,
) -> DenseSource:
    """The images of DATA with boxes, or with the class of every pixel.

    task: None for what the labels say. annotations: a file or folder of labels that are not where
    the formats expect them. ignore_index: a value of masks that does not count, beside 255. Raises
    MoceError if there are no labels of the task, if there are several kinds and no task, or if more
    than the share `max_skipped` of the images, or of the annotations, cannot be used.
    """
    found = _readers(data, annotations, max_skipped, ignore_index)
    if task is None and len(found) > 1:
        raise MoceError(
            f"{data} has boxes and masks of pixels: choose with --task detect or segment"
        )
    read = found.get(task) if task else next(iter(found.values()), None)
    if read is None:
        what = {"detect": "boxes", "segment": "masks of pixels"}.get(task or "", "boxes or masks")
        raise MoceError(f"no {what} in {annotations or data}: give {ACCEPTED}")
    return read()


def task_of(data: str, annotations: Path | None = None) -> Literal["classify"] | DenseTask:
    """The task that the labels of DATA are for; classify if there are neither boxes nor masks.

    Raises MoceError if there are both.
    """
    found = _readers(data, annotations, 1.0, None)
    if len(found) > 1:
        raise MoceError(
            f"{data} has boxes and masks of pixels: choose with --task detect or segment"
        )
    return next(iter(found), "classify")


def _readers(
    data: str, annotations: Path | None, max_skipped: float, ignore_index: int | None
) -> dict[DenseTask, Read]:
    """By task, the function that reads DATA for it."""
    sources = sources_of(data)
    if len(sources) > 1:
        _refuse_labels_of_several(data, [source.data for source in sources], annotations)
        return {}
    data = sources[0].data if sources else data
    root = expand(Path(data))
    annotations = None if annotations is None else expand(annotations)
    if annotations is not None and not annotations.exists():
        raise MoceError(f"no such annotations: {annotations}")
    if annotations is None and (columns := find_columns(data)) is not None:
        return {
            task: partial(read_columns, data, columns, task, max_skipped, ignore_index)
            for task in columns.tasks
        }
    if root.name in CONFIGS and root.is_file():
        root = root.parent
    if not root.is_dir():
        return {}
    found: dict[DenseTask, Read] = {}
    objects = _objects_reader(root, annotations)
    if objects is not None:
        found["detect"] = partial(objects, root, annotations, max_skipped)
    if find_layout(root, annotations) is not None:
        found["segment"] = partial(read_masks, root, annotations, max_skipped, ignore_index)
    return found


def _refuse_labels_of_several(data: str, sources: list[str], annotations: Path | None) -> None:
    """Raise MoceError if one of several sources has boxes or masks: which would the others' be?"""
    for source in sources:
        if annotations is not None or _readers(source, None, 1.0, None):
            raise MoceError(
                f"{data} names {len(sources)} sources: boxes and masks are read from one, such as "
                f"{source}; train on it alone, or choose --task classify"
            )


def _objects_reader(
    root: Path, annotations: Path | None
) -> Callable[[Path, Path | None, float], DenseSource] | None:
    if coco_parts(root, annotations):
        return read_coco
    if is_yolo(root, annotations):
        return read_yolo
    return read_voc if voc_files(root, annotations) else None
