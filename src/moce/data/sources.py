"""Where images come from: folders, parquet files, data sets by name, as lists of entries.

A DATA argument names a source. Every image has a stable identity (its path inside the folder,
its id in the file), so that clusters made once stay attached to it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from PIL import Image

from moce.config import expand
from moce.data.packed import Packed, find_packed
from moce.data.torchvision_sets import TORCHVISION_PREFIX, Label, torchvision_rows
from moce.errors import MoceError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
DEMO_PREFIX = "demo:"


@dataclass(frozen=True)
class Entry:
    """One image that can be opened. label, split: None where the source does not tell.

    A label is one class, or a tuple of any number of classes where the source has several.
    """

    id: str
    open: Callable[[], Image.Image]
    label: Label | None = None
    split: str | None = None


def is_named(data: str) -> bool:
    """Whether a DATA argument is a name, such as demo:digits, and no path."""
    return data.startswith((DEMO_PREFIX, TORCHVISION_PREFIX))


def open_source(data: str) -> list[Entry]:
    """The entries of a DATA argument. Raises MoceError if there is no such source or it is empty."""
    if data.startswith(DEMO_PREFIX):
        return _demo_entries(data.removeprefix(DEMO_PREFIX))
    if data.startswith(TORCHVISION_PREFIX):
        rows = torchvision_rows(data.removeprefix(TORCHVISION_PREFIX))
        return [Entry(*row) for row in rows]
    if not data:
        raise MoceError("no images named; give a folder, a .parquet file or demo:pretrain")
    path = expand(Path(data))
    if path.is_dir():
        return _folder_entries(path)
    if path.suffix == ".parquet" and path.is_file():
        return _parquet_entries(read_parquet(path), data)
    packed = find_packed(data)
    if packed is not None:
        return _packed_entries(packed)
    if path.is_file():
        raise MoceError(f"{data} is no folder of images, .parquet file or packed file")
    raise MoceError(f"no such images: {data} (give a folder, a .parquet file or demo:pretrain)")


def _folder_entries(root: Path) -> list[Entry]:
    """Images at any depth. A first folder named train, test or val is a split; a last one a label."""
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        kinds = " ".join(sorted(SUFFIXES))
        raise MoceError(f"no images in {root} (looked at any depth for {kinds})")
    return [_file_entry(path, path.relative_to(root)) for path in paths]


def _file_entry(path: Path, relative: Path) -> Entry:
    folders = list(relative.parts[:-1])
    split = SPLITS.get(folders[0]) if folders else None
    if split:
        folders = folders[1:]
    label = folders[-1] if folders else None
    return Entry(relative.as_posix(), lambda: Image.open(path), label, split)


def read_parquet(path: Path) -> pyarrow.Table:
    """The table of a parquet file. Raises MoceError if it cannot be read or has no image column."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise MoceError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if "image" not in table.column_names:
        raise MoceError(f"{path} has no column 'image' (columns: {', '.join(table.column_names)})")
    return table


def _parquet_entries(table: pyarrow.Table, name: str) -> list[Entry]:
    """Rows with encoded images in column image (bytes, or a struct with bytes); id, label, split optional."""
    if table.num_rows == 0:
        raise MoceError(f"no images in {name}")
    images = table.column("image")
    if pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pyarrow.compute.struct_field(images, "bytes")
    if not pyarrow.types.is_binary(images.type) and not pyarrow.types.is_large_binary(images.type):
        raise MoceError(f"column 'image' of {name} holds {images.type}, not encoded images")
    ids = _strings(table, "id") or [str(row) for row in range(table.num_rows)]
    labels = _strings(table, "label") or [None] * table.num_rows
    splits = _strings(table, "split") or [None] * table.num_rows

    def entry(row: int) -> Entry:
        split = SPLITS.get(splits[row] or "")
        return Entry(str(ids[row]), lambda: _decode(images[row].as_py()), labels[row], split)

    return [entry(row) for row in range(table.num_rows)]


def _packed_entries(packed: Packed) -> list[Entry]:
    columns = (packed.ids, packed.openers(), packed.labels, packed.splits)
    return [Entry(*row) for row in zip(*columns, strict=True)]


def _strings(table: pyarrow.Table, column: str) -> Sequence[str | None]:
    if column not in table.column_names:
        return []
    return table.column(column).cast(pyarrow.string()).to_pylist()


def _decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def demo_table() -> pyarrow.Table:
    """The embedded images: columns id, image, source, role, task, split, label (see assets/SOURCES.md)."""
    return read_parquet(Path(str(files("moce.data") / "assets" / "demo.parquet")))


def demo_tasks() -> list[str]:
    """Names of the embedded tasks; `demo:NAME` is each one's DATA argument."""
    tasks = demo_table().column("task").cast(pyarrow.string()).drop_null()
    return sorted(pyarrow.compute.unique(tasks).to_pylist())


def _demo_entries(name: str) -> list[Entry]:
    table = demo_table()
    column, value = ("role", name) if name == "pretrain" else ("task", name)
    chosen = table.filter(pyarrow.compute.equal(table[column].cast(pyarrow.string()), value))
    if chosen.num_rows == 0:
        valid = ", ".join(DEMO_PREFIX + task for task in ["pretrain", *demo_tasks()])
        raise MoceError(f"no embedded images '{DEMO_PREFIX}{name}' (valid: {valid})")
    return _parquet_entries(chosen, DEMO_PREFIX + name)
