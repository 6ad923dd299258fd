"""Predicted classes of images as a table: CSV, JSON lines or parquet, written part by part."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet

from moce.runs.files import atomic

TableFormat = Literal["csv", "jsonl", "parquet"]
Write = Callable[[Sequence[str], np.ndarray], None]  # ids, and probabilities [n, C]


@contextmanager
def open_table(path: Path, kind: TableFormat, classes: Sequence[str], top: int) -> Iterator[Write]:
    """A function that adds images to a table, which gets its name at the end.

    Every row has the image's id and, most probable first, its `top` classes and their
    probabilities. CSV has a column for each: class, probability, class_2, probability_2, ...
    """
    open_kind = {"csv": _open_csv, "jsonl": _open_jsonl, "parquet": _open_parquet}[kind]
    with atomic(path) as temporary, open_kind(temporary, top) as write:

        def add(ids: Sequence[str], probabilities: np.ndarray) -> None:
            order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
            found = np.take_along_axis(probabilities, order, axis=1)
            write(ids, [[classes[place] for place in row] for row in order], found)

        yield add


_Rows = Callable[[Sequence[str], list[list[str]], np.ndarray], None]


@contextmanager
def _open_csv(path: Path, top: int) -> Iterator[_Rows]:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        ends = ["", *(f"_{place}" for place in range(2, top + 1))]
        table.writerow(
            ["id", *(f"{name}{end}" for end in ends for name in ("class", "probability"))]
        )

        def write(ids: Sequence[str], names: list[list[str]], found: np.ndarray) -> None:
            for identity, classes, values in zip(ids, names, found, strict=True):
                pairs = zip(classes, values, strict=True)
                table.writerow([identity, *(x for n, v in pairs for x in (n, f"{v:.6f}"))])

        yield write


@contextmanager
def _open_jsonl(path: Path, top: int) -> Iterator[_Rows]:
    with path.open("w", encoding="utf-8") as file:

        def write(ids: Sequence[str], names: list[list[str]], found: np.ndarray) -> None:
            for identity, classes, values in zip(ids, names, found, strict=True):
                shown = [round(float(value), 6) for value in values]
                row = {"id": identity, "classes": classes, "probabilities": shown}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _open_parquet(path: Path, top: int) -> Iterator[_Rows]:
    text, number = pyarrow.string(), pyarrow.float32()
    columns = {"id": text, "classes": pyarrow.list_(text), "probabilities": pyarrow.list_(number)}
    schema = pyarrow.schema(columns)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def write(ids: Sequence[str], names: list[list[str]], found: np.ndarray) -> None:
            writer.write_table(pyarrow.table([ids, names, found.tolist()], schema=schema))

        yield write
