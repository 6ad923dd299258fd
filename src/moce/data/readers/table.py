"""Samples kept as columns: a few dozen bytes per image, however many a source has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.compute

from moce.data.decode import Raster
from moce.data.readers.sample import Encoded, Label, Sample, as_text

BLOCK = 2**14  # rows turned into Python values at a time


class SampleTable(Sequence[Sample]):
    """Encoded images of one source. A `Sample` is made when it is asked for. Can be pickled.

    ids, splits: strings; labels: strings, or lists of them where an image has several; splits and
    labels are None, or hold nulls, where the source has none. read: the bytes of a row's image.
    first_rows: [s + 1] int64, of each file and their number, if one is best read after the other.
    """

    def __init__(
        self,
        ids: pyarrow.Array,
        read: Callable[[int], bytes],
        labels: pyarrow.Array | None = None,
        splits: pyarrow.Array | None = None,
        first_rows: np.ndarray | None = None,
    ) -> None:
        nulls = pyarrow.nulls(len(ids))
        self.ids, self.read = ids, read
        self.labels = nulls if labels is None else _compact(labels)
        self.splits = nulls if splits is None else _compact(splits)
        self.first_rows = first_rows

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return int(self.ids.nbytes + self.labels.nbytes + self.splits.nbytes)

    @property
    def unique(self) -> bool:
        """Whether no id occurs twice."""
        return bool(pyarrow.compute.count_distinct(self.ids).as_py() == len(self.ids))

    def select(self, rows: Sequence[int]) -> SampleTable:
        """The images of these rows, which ascend."""
        numbers = np.array(rows, np.int64)
        table = copy(self)
        table.ids, table.labels, table.splits = (
            column.take(_indices(numbers)) for column in (self.ids, self.labels, self.splits)
        )
        table.read = _Selected(self.read, numbers)
        if self.first_rows is not None:
            table.first_rows = np.searchsorted(numbers, self.first_rows)
        return table

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        row = range(len(self))[row]
        identity, label, split = (
            column[row].as_py() for column in (self.ids, self.labels, self.splits)
        )
        return self._sample(row, identity, label, split)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), BLOCK):
            columns = (
                c.slice(start, BLOCK).to_pylist() for c in (self.ids, self.labels, self.splits)
            )
            for row, values in enumerate(zip(*columns, strict=True), start):
                yield self._sample(row, *values)

    def _sample(
        self, row: int, identity: str, label: str | list[str] | None, split: str | None
    ) -> Sample:
        return Sample(identity, self._opener(row), _known(label), split)

    def _opener(self, row: int) -> Callable[[], Raster]:
        return Encoded(partial(self.read, row))


@dataclass(frozen=True)
class _Selected:
    """Reads some rows of a table, by their place among these."""

    read: Callable[[int], bytes]
    rows: np.ndarray

    def __call__(self, row: int) -> bytes:
        return self.read(int(self.rows[row]))


def _indices(rows: np.ndarray) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(rows), [None, pyarrow.py_buffer(rows)])


class FileTable(SampleTable):
    """Files of one folder, by their path in it. Arguments as for SampleTable.

    opener: opens a file. Ids are the names as text, which differ from names that are not UTF-8.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        opener: Callable[[Path], Callable[[], Raster]],
        labels: pyarrow.Array | None = None,
        splits: pyarrow.Array | None = None,
    ) -> None:
        ids = [as_text(name) for name in names]
        column = text_column(ids)
        super().__init__(column, self._read, labels, splits)
        self.root, self.opener = root, opener
        self.names = column
        if ids != list(names):
            self.names = pyarrow.array(map(os.fsencode, names), pyarrow.large_binary())

    def select(self, rows: Sequence[int]) -> FileTable:
        numbers = _indices(np.array(rows, np.int64))
        table = copy(self)
        table.ids, table.labels, table.splits, table.names = (
            column.take(numbers) for column in (self.ids, self.labels, self.splits, self.names)
        )
        table.read = table._read
        return table

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.root / os.fsdecode(self.names[row].as_py())

    def _read(self, row: int) -> bytes:
        return self.path(row).read_bytes()

    def _opener(self, row: int) -> Callable[[], Raster]:
        return self.opener(self.path(row))


def labels_and_splits(
    samples: Sequence[Sample],
) -> tuple[list[Label | None], list[str | None]]:
    """Of each image; of a table without making its samples."""
    if not isinstance(samples, SampleTable):
        return [sample.label for sample in samples], [sample.split for sample in samples]
    return [*map(_known, _values(samples.labels))], _values(samples.splits)


def ids_of(samples: Sequence[Sample]) -> list[str]:
    """Of each image."""
    if isinstance(samples, SampleTable):
        return list(samples.ids.to_pylist())
    return [sample.id for sample in samples]


def select(samples: Sequence[Sample], rows: Sequence[int]) -> Sequence[Sample]:
    """The images of these rows, which ascend; those of a table as a table."""
    if len(rows) == len(samples):
        return samples
    return samples.select(rows) if isinstance(samples, SampleTable) else [samples[r] for r in rows]


def _values(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    """The values of a column, with one object for all that are equal."""
    if isinstance(column, pyarrow.ChunkedArray):
        return [value for chunk in column.chunks for value in _values(chunk)]
    if not pyarrow.types.is_dictionary(column.type):
        return list(column.to_pylist())
    values = dict(enumerate(column.dictionary.to_pylist()))
    return [values.get(number) for number in column.indices.to_pylist()]


def _known(label: str | list[str] | None) -> Label | None:
    return tuple(sorted(set(label))) if isinstance(label, list) else label


def text_column(texts: Sequence[str | None]) -> pyarrow.Array:
    """Strings as a column. pyarrow.array would import pandas, which takes a second."""
    blocks = [pyarrow.nulls(0, pyarrow.large_string())]
    for start in range(0, len(texts), BLOCK):
        builder = pyarrow.lib.StringBuilder()
        builder.append_values(texts[start : start + BLOCK])
        blocks.append(builder.finish().cast(pyarrow.large_string()))
    return pyarrow.concat_arrays(blocks)


def label_column(labels: Sequence[Label | None]) -> pyarrow.Array:
    """Labels as strings, or as lists of them if any image has a list."""
    if not any(isinstance(label, tuple) for label in labels):
        return pyarrow.array(labels, pyarrow.string())
    lists = [[label] if isinstance(label, str) else label for label in labels]
    return pyarrow.array(lists, pyarrow.list_(pyarrow.string()))


def _compact(values: pyarrow.Array) -> pyarrow.Array:
    """Each distinct string once."""
    if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
        return values.dictionary_encode()
    return values
