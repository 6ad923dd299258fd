"""Labels and splits in a table beside a folder of images: CSV, TSV, JSON or JSON lines.

A table belongs to a folder if it is in it, or next to it and named after it (photos.csv,
photos_labels.csv), and if it names its images: by path, file name, or file name without suffix.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moce.data.readers.labels import LABELS, SPLITS, column_labels, in_order, label_of, pick
from moce.data.readers.sample import Label, suffix_of
from moce.data.readers.splits import column_splits
from moce.errors import MoceError
from moce.runtime.progress import log

SUFFIXES = frozenset({".csv", ".tsv", ".json", ".jsonl"})
MOST_TABLES = 100  # more files are something else
BESIDE = ("{0}", "{0}_labels", "{0}-labels", "labels")  # of a folder named {0}
_FILES = "file_name filename file path image_path filepath image img image_id id name"
FILES = tuple(_FILES.split())
MOST_BYTES = 2**28
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What a table says of an image."""

    label: Label | None
    split: str | None


def find_entries(root: Path, files: Iterable[str], names: Sequence[str]) -> dict[str, Entry] | None:
    """What the tables of a folder say of its images, by name; None if there is no table of them.

    files: all files in the folder, by their path in it; names: of its images. Says how many labels
    each table has. Raises MoceError if two tables give an image different labels.
    """
    inside = [root / name for name in files if suffix_of(name).lower() in SUFFIXES]
    if inside:
        stems = {PurePosixPath(name).stem for name in names}  # a file per image is no table
        inside = [path for path in inside if path.stem not in stems]
    parent = root.resolve().parent
    beside = [
        path
        for pattern in BESIDE
        for suffix in sorted(SUFFIXES)
        if (path := parent / (pattern.format(root.resolve().name) + suffix)).is_file()
    ]
    found: dict[str, Entry] = {}
    used = False
    for path in [*inside[:MOST_TABLES], *beside]:
        folder = path.parent.relative_to(root).as_posix() if path in inside else "."
        entries = _entries_of(path, "" if folder == "." else f"{folder}/", names)
        if entries is None:
            continue
        used = True
        for name, entry in entries.items():
            if found.setdefault(name, entry).label != entry.label:
                raise MoceError(f"{path} gives {name} another label than another table of {root}")
        labeled = sum(entry.label is not None for entry in entries.values())
        log(f"{root}: labels of {labeled} of {len(names)} images are from {path.name}")
    return found if used else None


def _entries_of(path: Path, folder: str, names: Sequence[str]) -> dict[str, Entry] | None:
    """The entries of one table; None if it is no table of these images, or has no labels."""
    rows = _read_rows(path)
    if not rows:
        return None
    lookup = _Lookup(names, folder)
    columns = list(rows[0])
    column, hits = _file_column(columns, rows, lookup)
    if column is None:
        return None
    labels = _labels(rows, columns, column)
    if labels is None:
        log(f"{path} names images, but none of its columns is called label: it is not used")
        return None
    key = pick([name for name in columns if name != column], SPLITS)
    splits = column_splits([row.get(key) for row in rows] if key else [None] * len(rows), str(path))
    if missing := len(rows) - hits:
        log(f"{path}: {missing} of {len(rows)} rows name no image of the folder")
    found: dict[str, Entry] = {}
    for row, label, split in zip(rows, labels, splits, strict=True):
        name = lookup.find(row.get(column))
        if name is not None:
            before = found.get(name)
            found[name] = Entry(_joined(before.label, label) if before else label, split)
    return found


def _joined(first: Label | None, second: Label | None) -> Label | None:
    """The labels of an image with two rows: several classes, if they differ."""
    if first == second or second is None:
        return first
    parts = {
        p
        for label in (first, second)
        if label
        for p in ((label,) if isinstance(label, str) else label)
    }
    return tuple(sorted(parts, key=in_order))


class _Lookup:
    """Images by what a table may call them; a name of several images stands for none."""

    def __init__(self, names: Sequence[str], folder: str) -> None:
        self._folder = folder
        self._by: dict[str, str | None] = {}
        for name in names:
            path = PurePosixPath(name)
            for key in {name, path.name, path.stem, path.with_suffix("").as_posix()} - {""}:
                self._by[key] = name if key not in self._by else None
        self._by.update({name: name for name in names})

    def find(self, value: Any) -> str | None:
        if value is None:
            return None
        text = str(value).strip().replace("\\", "/").removeprefix("./")
        candidates = [self._folder + text, text]
        parts = PurePosixPath(text).parts
        candidates += ["/".join(parts[start:]) for start in range(1, len(parts))]
        return next((found for key in candidates if (found := self._by.get(key))), None)


def _file_column(columns: list[str], rows: list[Row], lookup: _Lookup) -> tuple[str | None, int]:
    """The column that names the most images, and how many; usual names first."""
    usual = [name for name in FILES if (pick(columns, (name,)))]
    order = [*(pick(columns, (name,)) or "" for name in usual), *columns]
    best, most = None, 0
    for column in dict.fromkeys(order):
        hits = sum(lookup.find(row.get(column)) is not None for row in rows)
        if hits > most:
            best, most = column, hits
    return best, most


def _labels(rows: list[Row], columns: list[str], files: str) -> list[Label | None] | None:
    """The column of labels: by its name, or the only other one; or a column of 0 and 1 per class."""
    others = [name for name in columns if name != files and pick([name], SPLITS) is None]
    key = pick(others, LABELS) or (others[0] if len(others) == 1 else None)
    if key is not None:
        return column_labels([row.get(key) for row in rows])
    if len(others) > 1 and all(_mark(row.get(name)) is not None for row in rows for name in others):
        marks = [[_mark(row[name]) for name in others] for row in rows]
        return column_labels(marks, others.__getitem__)
    return None


def _mark(value: Any) -> int | None:
    return {"0": 0, "1": 1}.get(str(label_of(value)))


# --- files ------------------------------------------------------------------------------------------


def _read_rows(path: Path) -> list[Row]:
    """The rows of a table, as dictionaries; none if it is something else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return []
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return _from_json(json.loads(text))
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return rows if all(isinstance(row, dict) for row in rows) else []
        return _from_csv(text, path.suffix.lower())
    except (OSError, ValueError, csv.Error):  # not a table, which is no mistake
        return []


def _from_csv(text: str, suffix: str) -> list[Row]:
    first = text.split("\n", 1)[0]
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=first.count)
    lines = list(csv.reader(text.splitlines(), delimiter=delimiter))
    lines = [line for line in lines if line]
    if not lines:
        return []
    header = lines[0]
    if pick(header, FILES) is None and pick(header, LABELS) is None and len(header) == 2:
        header, lines = ["file", "label"], [["file", "label"], *lines]  # a table without a header
    return [_plain(dict(zip(header, line, strict=False))) for line in lines[1:]]


def _plain(row: Row) -> Row:
    """Whole numbers that pandas wrote as 3.0, since the column has gaps, as 3."""
    whole = {k: v.removesuffix(".0") for k, v in row.items() if v[:-2].lstrip("-").isdigit()}
    return {**row, **whole}


def _from_json(content: Any) -> list[Row]:
    """A list of rows or pairs; a dictionary from files to labels; either under the key "labels"."""
    if isinstance(content, dict) and isinstance(content.get("labels"), list | dict):
        content = content["labels"]
    if isinstance(content, dict):
        content = list(content.items())
    if not isinstance(content, list):
        return []
    if all(isinstance(row, dict) for row in content):
        return content
    pairs = [row for row in content if isinstance(row, list | tuple) and len(row) == 2]
    if len(pairs) < len(content):
        return []
    return [
        {"file": name, **(value if isinstance(value, dict) else {"label": value})}
        for name, value in pairs
    ]
