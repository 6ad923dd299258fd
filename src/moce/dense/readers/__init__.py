"""One file per format of boxes and masks; `read_dense` finds the one that DATA needs."""

from __future__ import annotations

from pathlib import Path

from moce.config import expand
from moce.dense.readers.coco import coco_parts, read_coco
from moce.dense.types import DenseSource, DenseTask
from moce.errors import MoceError

ACCEPTED = "COCO JSON (annotations/instances_*.json)"


def read_dense(
    data: str, task: DenseTask | None, annotations: Path | None = None, max_skipped: float = 0.5
) -> DenseSource:
    """The images of DATA with boxes, or with the class of every pixel.

    task: None for what the labels say. annotations: a file or folder of labels that are not where
    the formats expect them. Raises MoceError if there are none, or more than the share `max_skipped`
    of the images, or of the annotations, cannot be used.
    """
    root = expand(Path(data))
    if root.is_dir() and coco_parts(root, annotations):
        return read_coco(root, annotations, max_skipped)
    raise MoceError(f"no boxes or masks in {data}: give {ACCEPTED}")
