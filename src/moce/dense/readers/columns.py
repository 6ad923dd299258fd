"""Parquet files and Hugging Face data sets with a column of objects or of masks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from moce.config import expand
from moce.data.decode import Raster, open_encoded
from moce.data.readers.factory import open_source
from moce.data.readers.huggingface import HUB_PREFIX, is_saved
from moce.data.readers.sample import Sample, error_line
from moce.dense import rle
from moce.dense.images import mask_values
from moce.dense.readers.layouts import Layout, Pair, table_of
from moce.dense.readers.masks import masked_source
from moce.dense.readers.objects import (
    ROUNDING,
    Annotation,
    Picture,
    assemble,
    in_threads,
    size_or_fault,
)
from moce.dense.readers.pairs import visible
from moce.dense.types import IGNORE, DenseSource, DenseTask
from moce.errors import MoceError
from moce.runtime.progress import log

OBJECTS = ("objects", "annotations")
CATEGORY = ("category", "categories", "category_id", "label", "labels")
MASKS = ("annotation", "mask", "segmentation_mask", "semantic_mask", "label")
# Masks of objects: a column of its own with a list of images, one per object, or a part of the objects'.
OBJECT_MASKS = ("masks", "instance_masks")
MASK_OF_OBJECT = ("segmentation", "mask", "masks")
Cell = Callable[[], Raster]


@dataclass
class Columns:
    """objects: the column's name, if there is one, and its values by row; masks: one opener a row.

    features: what the file says about its columns, as `datasets` writes it. object_masks: by row a
    list of images, one per object, if there is such a column.
    """

    samples: Sequence[Sample]
    features: dict[str, Any]
    objects: tuple[str, list[Any]] | None
    masks: list[Cell] | None
    object_masks: list[Any] | None = None

    @property
    def tasks(self) -> list[DenseTask]:
        found: list[tuple[DenseTask, Any]] = [("detect", self.objects), ("segment", self.masks)]
        return [task for task, column in found if column is not None]


def find_columns(data: str) -> Columns | None:
    """The columns of a parquet file or data set; None for other DATA, or without boxes and masks."""
    path = expand(Path(data))
    if data.startswith(HUB_PREFIX) or (path.is_dir() and is_saved(path)):
        return _of_datasets(data, path)
    files = _parquet_files(path)
    return _of_parquet(data, files) if files else None


def read_columns(
    data: str, columns: Columns, task: DenseTask, max_skipped: float, ignore_index: int | None
) -> DenseSource:
    """The images of a table with their objects or masks. Raises MoceError if they cannot be used."""
    if task == "segment" and columns.masks is not None:
        pairs = [
            Pair(sample.id, sample, Sample(sample.id, mask), sample.split)
            for sample, mask in zip(columns.samples, columns.masks, strict=True)
        ]
        layout = Layout(pairs, None, table_of({value: value for value in range(IGNORE)}))
        return masked_source(data, layout, max_skipped, ignore_index)
    assert columns.objects is not None
    name, rows = columns.objects
    classes = _names(columns.features.get(name)) or _classes_in(rows)
    number = {value: index for index, value in enumerate(classes)}
    masks = columns.object_masks or [None] * len(rows)
    jobs = [partial(_annotations, *each, number) for each in zip(rows, masks, strict=True)]
    pictures = [
        Picture(sample.id, sample.open, annotations, sample.split)
        for sample, annotations in zip(
            columns.samples, in_threads("read objects", jobs), strict=True
        )
    ]
    _settle_corners(data, pictures)
    return assemble(data, classes, pictures, max_skipped)


# --- tables -------------------------------------------------------------------------------------------


def _parquet_files(path: Path) -> list[Path]:
    """A parquet file, or those of a folder (data/train-00000-of-00002.parquet), as `read_folder` sorts them."""
    if path.is_dir():
        return visible([*path.glob("*.parquet"), *path.glob("*/*.parquet")], path)
    return [path] if path.suffix.lower() == ".parquet" and path.is_file() else []


def _of_parquet(data: str, files: list[Path]) -> Columns | None:
    try:
        schema = pyarrow.parquet.read_schema(files[0])
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise MoceError(f"cannot read {files[0]}: {str(error).splitlines()[0]}") from None
    objects = _object_column(schema)
    mask = next((n for n in MASKS if n in schema.names and _is_image(schema.field(n).type)), None)
    if objects is None and mask is None:
        return None
    instances = _object_mask_column(schema) if objects else None
    wanted = [name for name in (objects, mask, instances) if name is not None]
    samples = open_source(data)  # refuses files that cannot be read, or differ
    table = pyarrow.concat_tables(pyarrow.parquet.read_table(f, columns=wanted) for f in files)
    if len(samples) != table.num_rows:
        raise MoceError(
            f"{data} holds {len(samples)} images, but {table.num_rows} rows of {wanted[0]}"
        )
    cells: list[Cell] | None = None
    if mask is not None:
        cells = [partial(_open_cell, table.column(mask), row) for row in range(table.num_rows)]
    rows = (objects, table.column(objects).to_pylist()) if objects else None
    object_masks = table.column(instances).to_pylist() if instances else None
    return Columns(samples, _stated_features(schema), rows, cells, object_masks)


def _stated_features(schema: pyarrow.Schema) -> dict[str, Any]:
    """What `datasets` wrote about the columns; {} if it did not write the file."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}


def _object_column(schema: pyarrow.Schema) -> str | None:
    return next(
        (n for n in OBJECTS if n in schema.names and _has_boxes(schema.field(n).type)), None
    )


def _object_mask_column(schema: pyarrow.Schema) -> str | None:
    """A column with a list of images, one per object."""
    return next(
        (n for n in OBJECT_MASKS if n in schema.names and _is_images(schema.field(n).type)), None
    )


def _is_images(kind: pyarrow.DataType) -> bool:
    listed = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return listed and _is_image(kind.value_type)


def _has_boxes(kind: pyarrow.DataType) -> bool:
    """True for a struct of lists, or a list of structs, with bbox."""
    while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    return pyarrow.types.is_struct(kind) and kind.get_field_index("bbox") >= 0


def _is_image(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _open_cell(column: pyarrow.ChunkedArray, row: int) -> Raster:
    value = column[row].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if not content:
        raise ValueError("no mask")
    return open_encoded(content)


def _of_datasets(data: str, path: Path) -> Columns | None:
    samples = open_source(data)  # refuses what cannot be read
    import datasets

    name, _, split = data.removeprefix(HUB_PREFIX).partition(":")
    if data.startswith(HUB_PREFIX):
        found = datasets.load_dataset(name, split=split or None)
    else:
        found = datasets.load_from_disk(str(path))
    tables = [found] if hasattr(found, "features") else list(found.values())
    features = tables[0].features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    objects = _object_column(features.arrow_schema)
    instances = _object_mask_column(features.arrow_schema) if objects else None
    cells = rows = object_masks = None
    if len(images) == 2:  # the picture and its mask
        cells = [cell for table in tables for cell in _mask_cells(table, images[1])]
    if objects is not None:
        rows = (objects, [row for table in tables for row in _values(table, objects)])
    if instances is not None:
        object_masks = [row for table in tables for row in _values(table, instances)]
    if objects is None and cells is None:
        return None
    return Columns(samples, features.to_dict(), rows, cells, object_masks)


def _values(table: Any, column: str) -> list[Any]:
    return table.select_columns(column).with_format("arrow")[:][column].to_pylist()


def _mask_cells(table: Any, column: str) -> Iterator[Cell]:
    import datasets

    encoded = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    yield from (partial(_open_row, encoded, row, column) for row in range(len(table)))


def _open_row(table: Any, row: int, column: str) -> Raster:
    value = table[row][column]
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("no mask")
    return open_encoded(value["bytes"] or Path(value["path"]))


# --- objects ------------------------------------------------------------------------------------------


def _names(feature: Any, within: bool = False) -> list[str]:
    """The names of the classes that `datasets` wrote about a column of objects; [] if there are none."""
    if isinstance(feature, dict):
        if within and isinstance(feature.get("names"), list):
            return [str(name) for name in feature["names"]]
        parts = [_names(value, within or key in CATEGORY) for key, value in feature.items()]
    elif isinstance(feature, list):
        parts = [_names(value, within) for value in feature]
    else:
        return []
    return next(filter(None, parts), [])


def _entries(row: Any) -> list[dict[str, Any]]:
    """One dict per object, of a list of structs or a struct of lists."""
    if isinstance(row, dict):
        lists = {key: value for key, value in row.items() if isinstance(value, list)}
        count = len(lists.get("bbox", ()))
        return [
            {key: value[n] if n < len(value) else None for key, value in lists.items()}
            for n in range(count)
        ]
    return list(row or ())


def _category(entry: dict[str, Any]) -> Any:
    return next((entry[key] for key in CATEGORY if entry.get(key) is not None), None)


def _classes_in(rows: list[Any]) -> list[str]:
    """The classes that occur, if nothing names them: names in order, or numbers from 0."""
    found = {_category(entry) for row in rows for entry in _entries(row)} - {None}
    if all(isinstance(value, int) for value in found):
        return [str(value) for value in range(max(found, default=-1) + 1)]
    return sorted(map(str, found))


def _annotations(row: Any, masks: Any, number: dict[str, int]) -> list[Annotation]:
    """The objects of a row; masks: an image for each, or None if they have their own or none at all."""
    entries = _entries(row)
    if masks is None:
        return [_annotation(entry, _own_mask(entry), number) for entry in entries]
    if len(masks) != len(entries):
        fault = f"another number of masks: {len(masks)} for {len(entries)} objects"
        return [Annotation(fault=fault) for _ in entries]
    return [_annotation(*each, number) for each in zip(entries, masks, strict=True)]


def _own_mask(entry: dict[str, Any]) -> Any:
    return next((entry[key] for key in MASK_OF_OBJECT if entry.get(key) is not None), None)


def _annotation(entry: dict[str, Any], mask: Any, number: dict[str, int]) -> Annotation:
    category = _category(entry)
    label = category if isinstance(category, int) else number.get(str(category), str(category))
    box, area = entry.get("bbox"), entry.get("area")
    crowd = bool(entry.get("iscrowd") or entry.get("is_crowd"))
    try:
        corners = [float(value) for value in box]  # type: ignore[union-attr]
        stated = None if area is None else float(area)
    except (TypeError, ValueError):
        return Annotation(fault=f"not a box: {box}")
    try:
        return Annotation(label, corners, _mask(mask), crowd, stated)
    except Exception as error:  # decoders raise errors of any type
        return Annotation(fault=f"damaged mask: {error_line(error)}")


def _mask(written: Any) -> Any:
    """Polygons or run lengths as `Annotation` has them, of these or of an image: a part above 0."""
    if isinstance(written, dict) and "counts" not in written:
        written = written.get("bytes") or Path(written["path"])
    if isinstance(written, bytes | Path):
        pixels = mask_values(open_encoded(written)) > 0
        return rle.encode(pixels[None])[0] if pixels.any() else None
    if isinstance(written, list) and written and not isinstance(written[0], list):
        return [written]  # one polygon
    return written


def _settle_corners(data: str, pictures: list[Picture]) -> None:
    """From what the files hold to corners: x, y, width, height as COCO's, unless this cannot be.

    Boxes are taken as corners already if otherwise some would leave their image, and all are corners
    within it.
    """
    leaves, corners = False, True
    for picture in pictures:
        size = size_or_fault(picture)
        boxes = [a.box for a in picture.annotations if a.box is not None and len(a.box) == 4]
        if isinstance(size, str) or not boxes:
            continue
        found = np.array(boxes)
        limit = np.array([size[1], size[0]]) + ROUNDING
        leaves |= bool((found[:, :2] + found[:, 2:] > limit).any())
        corners &= bool((found[:, 2:] > found[:, :2]).all() and (found[:, 2:] <= limit).all())
    if leaves and corners:
        log(
            f"{data}: bbox is taken as x1, y1, x2, y2; as x, y, width, height it would leave the images"
        )
        return
    for annotation in (a for picture in pictures for a in picture.annotations):
        if annotation.box is not None and len(annotation.box) == 4:
            x, y, width, height = annotation.box
            annotation.box = (x, y, x + width, y + height)
