"""Samples kept as columns: a few dozen bytes per image, however many a source has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow
import pyarrow.compute

from moce.data.decode import Raster
from moce.data.readers.columns import (
    BLOCK,
    TEXT,
    Column,
    are_lists,
    compact,
    indices,
    label_column,
    plain,
    plain_column,
    text_column,
    values_of,
)
from moce.data.readers.sample import Encoded, Label, Sample, as_text


class SampleTable(Sequence[Sample]):
    """Encoded images of one source. A `Sample` is made when it is asked for. Can be pickled.

    ids, splits: strings; labels: strings, or lists of them where an image has several; splits and
    labels are None, or hold nulls, where the source has none. reader: the bytes of a row's image.
    first_rows: [s + 1] int64, of each file and their number, if one is best read after the other.
    """

    def __init__(
        self,
        ids: pyarrow.Array,
        reader: Callable[[int], bytes],
        labels: pyarrow.Array | None = None,
        splits: pyarrow.Array | None = None,
        first_rows: np.ndarray | None = None,
    ) -> None:
        nulls = pyarrow.nulls(len(ids))
        self.ids, self.reader = ids, reader
        self.labels = nulls if labels is None else compact(labels)
        self.splits = nulls if splits is None else compact(splits)
        self.first_rows = first_rows
        self.rows: np.ndarray | None = None  # of the reader, where some were selected

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

    def with_prefix(self, prefix: str) -> SampleTable:
        """The same images with ids that start with `prefix`."""
        join, text = pyarrow.compute.binary_join_element_wise, pyarrow.large_string()
        table = copy(self)
        parts = (pyarrow.scalar(prefix, text), self.ids.cast(text), pyarrow.scalar("", text))
        table.ids = join(*parts)
        return table

    def renamed(self, ids: Sequence[str]) -> SampleTable:
        """The same images with other ids."""
        table = copy(self)
        table.ids = text_column(ids)
        return table

    def in_split(self, split: Callable[[str | None], str | None]) -> SampleTable:
        """The same images with other splits. split: from an image's split, or None, to the new one."""
        table = copy(self)
        old = compact(self.splits.cast(TEXT))
        new = pyarrow.array([*map(split, old.dictionary.to_pylist())], TEXT).take(old.indices)
        outer = split(None) if old.null_count else None
        table.splits = compact(new if outer is None else new.fill_null(outer))
        return table

    def only_ids(self, ids: pyarrow.Array) -> SampleTable:
        """The same images with these ids, to be opened only."""
        table = copy(self)
        nulls = pyarrow.nulls(len(ids))
        table.ids, table.labels, table.splits = ids, nulls, nulls
        return table

    def select(self, rows: Sequence[int] | np.ndarray) -> SampleTable:
        """The images of these rows, which ascend."""
        numbers = np.asarray(rows, np.int64)
        table = copy(self)
        table.ids, table.labels, table.splits = (
            column.take(indices(numbers)) for column in (self.ids, self.labels, self.splits)
        )
        table.rows = numbers if self.rows is None else self.rows[numbers]
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
        columns = (self.ids, self.labels, self.splits)
        return self._sample(row, *(plain(column[row].as_py()) for column in columns))

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), BLOCK):
            columns = (
                values_of(c.slice(start, BLOCK)) for c in (self.ids, self.labels, self.splits)
            )
            for row, values in enumerate(zip(*columns, strict=True), start):
                yield self._sample(row, *values)

    def _sample(self, row: int, identity: str, label: Label | None, split: str | None) -> Sample:
        return Sample(identity, self.opener_of(row), label, split)

    def read(self, row: int) -> bytes:
        """The bytes of a row's image."""
        return self.reader(self._reader_row(row))

    def _reader_row(self, row: int) -> int:
        return row if self.rows is None else int(self.rows[row])

    def opener_of(self, row: int) -> Callable[[], Raster]:
        """What opens the image of a row."""
        return Encoded(partial(self.read, row))


@dataclass(frozen=True)
class _Joined:
    """Reads the rows of several tables, counted through them. starts: of each, and their end."""

    parts: Sequence[SampleTable]
    starts: np.ndarray

    def place(self, row: int) -> tuple[SampleTable, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - int(self.starts[number])

    def __call__(self, row: int) -> bytes:
        part, inside = self.place(row)
        return part.read(inside)


class FileTable(SampleTable):
    """Files of one folder, by their path in it.

    names: the paths. opener: opens a file. ids: default: the names as text, which differ from names
    that are not UTF-8. Others as for SampleTable.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        opener: Callable[[Path], Callable[[], Raster]],
        labels: pyarrow.Array | None = None,
        splits: pyarrow.Array | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        texts = [as_text(name) for name in names] if ids is None else ids
        super().__init__(text_column(texts), self._unused, labels, splits)
        self.root, self.opener = root, opener
        self.prefix = ""  # of the ids, which is not part of the names
        # The ids are the names, unless these are kept.
        self.names = None if texts == list(names) else _bytes_column(names)

    @staticmethod
    def _unused(row: int) -> bytes:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.names is None else int(self.names.nbytes))

    def with_prefix(self, prefix: str) -> FileTable:
        table = super().with_prefix(prefix)
        assert isinstance(table, FileTable)
        table.prefix = prefix + self.prefix
        return table

    def renamed(self, ids: Sequence[str]) -> FileTable:
        names = [self._name(row) for row in range(len(self))]
        table = super().renamed(ids)
        assert isinstance(table, FileTable)
        table.names = _bytes_column(names)
        return table

    def select(self, rows: Sequence[int] | np.ndarray) -> FileTable:
        table = super().select(rows)
        assert isinstance(table, FileTable)
        table.rows = None  # the paths go along
        if self.names is not None:
            table.names = self.names.take(indices(np.asarray(rows, np.int64)))
        return table

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.root / self._name(row)

    def _name(self, row: int) -> str:
        if self.names is not None:
            return os.fsdecode(self.names[row].as_py())
        return str(self.ids[row].as_py()).removeprefix(self.prefix)

    def read(self, row: int) -> bytes:
        return self.path(row).read_bytes()

    def opener_of(self, row: int) -> Callable[[], Raster]:
        return self.opener(self.path(row))


def _bytes_column(names: Sequence[str]) -> pyarrow.Array:
    return pyarrow.array(map(os.fsencode, names), pyarrow.large_binary())


class RasterTable(SampleTable):
    """Images that are not encoded. raster_of: the image of a row; others as for SampleTable."""

    def __init__(
        self,
        ids: pyarrow.Array,
        raster_of: Callable[[int], Raster],
        labels: pyarrow.Array | None = None,
        splits: pyarrow.Array | None = None,
    ) -> None:
        super().__init__(ids, raster_of, labels, splits)  # type: ignore[arg-type]

    def opener_of(self, row: int) -> Callable[[], Raster]:
        return partial(self.reader, self._reader_row(row))  # type: ignore[return-value]


class ListTable(SampleTable):
    """A list of images, with its columns."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__(
            text_column([sample.id for sample in samples]),
            lambda row: samples[row].open(),  # type: ignore[arg-type, return-value]
            label_column([sample.label for sample in samples]),
            text_column([sample.split for sample in samples]),
        )

    def opener_of(self, row: int) -> Callable[[], Raster]:
        return partial(self.reader, self._reader_row(row))  # type: ignore[return-value]


class JoinedTable(SampleTable):
    """Several tables as one."""

    def __init__(self, parts: Sequence[SampleTable]) -> None:
        lists = any(are_lists(part.labels.type) for part in parts)
        kind = pyarrow.list_(TEXT) if lists else TEXT
        ids = pyarrow.concat_arrays([part.ids.cast(pyarrow.large_string()) for part in parts])
        starts = np.cumsum([0, *map(len, parts)])
        super().__init__(
            ids,
            _Joined(
                [
                    part.only_ids(ids.slice(start, len(part)))
                    for part, start in zip(parts, starts.tolist(), strict=False)
                ],
                starts,
            ),
            pyarrow.concat_arrays([plain_column(part.labels, kind) for part in parts]),
            pyarrow.concat_arrays([plain_column(part.splits) for part in parts]),
            _files(parts, starts),
        )

    def opener_of(self, row: int) -> Callable[[], Raster]:
        assert isinstance(self.reader, _Joined)
        part, inside = self.reader.place(self._reader_row(row))
        return part.opener_of(inside)


def _files(parts: Sequence[SampleTable], starts: np.ndarray) -> np.ndarray | None:
    """Where each file starts, if any part is far; images read at random count as one file each."""
    if all(part.first_rows is None for part in parts):
        return None
    ends = [
        start + (np.arange(len(part)) + 1 if part.first_rows is None else part.first_rows[1:])
        for part, start in zip(parts, starts, strict=False)
    ]
    return np.concatenate([[0], *ends])


def labels_and_splits(
    samples: Sequence[Sample],
) -> tuple[Sequence[Label | None], Sequence[str | None]]:
    """Of each image; of a table without making its samples."""
    if not isinstance(samples, SampleTable):
        return [sample.label for sample in samples], [sample.split for sample in samples]
    return Column(samples.labels), Column(samples.splits)


def ids_of(samples: Sequence[Sample]) -> Sequence[str]:
    """Of each image."""
    if isinstance(samples, SampleTable):
        return Column(samples.ids)
    return [sample.id for sample in samples]


def select(samples: Sequence[Sample], rows: Sequence[int] | np.ndarray) -> Sequence[Sample]:
    """The images of these rows, which ascend; those of a table as a table."""
    if len(rows) == len(samples):
        return samples
    return samples.select(rows) if isinstance(samples, SampleTable) else [samples[r] for r in rows]
