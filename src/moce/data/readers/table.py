"""Samples kept as columns: a few dozen bytes per image, however many a source has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
import pyarrow
import pyarrow.compute

from moce.data.readers.sample import Encoded, Label, Sample

TEXT = pyarrow.large_string()
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
        known: Label | None = tuple(sorted(set(label))) if isinstance(label, list) else label
        return Sample(identity, Encoded(partial(self.read, row)), known, split)


@dataclass(frozen=True)
class _Readers:
    """Reads rows of several sources. first_rows: [s + 1] int64."""

    readers: Sequence[Callable[[int], bytes]]
    first_rows: np.ndarray

    def __call__(self, row: int) -> bytes:
        source = int(np.searchsorted(self.first_rows, row, "right")) - 1
        return self.readers[source](row - int(self.first_rows[source]))


def joined(tables: Sequence[SampleTable], names: Sequence[str]) -> SampleTable:
    """The images of several tables, in order, with ids NAME/ID."""
    starts = np.cumsum([0, *map(len, tables)])
    slash = pyarrow.scalar("/", TEXT)
    ids = [
        pyarrow.compute.binary_join_element_wise(
            pyarrow.scalar(name, TEXT), table.ids.cast(TEXT), slash
        )
        for table, name in zip(tables, names, strict=True)
    ]
    several = any(pyarrow.types.is_list(table.labels.type) for table in tables)
    labels = [_as_lists(table.labels) if several else table.labels.cast(TEXT) for table in tables]
    splits = [table.splits.cast(TEXT) for table in tables]
    parts = [table.first_rows for table in tables]
    first_rows = [
        start + part[:-1] for start, part in zip(starts, parts, strict=False) if part is not None
    ]
    return SampleTable(
        pyarrow.concat_arrays(ids),
        _Readers([table.read for table in tables], starts),
        pyarrow.concat_arrays(labels),
        pyarrow.concat_arrays(splits),
        np.concatenate([*first_rows, starts[-1:]]) if len(first_rows) == len(tables) else None,
    )


def _as_lists(labels: pyarrow.Array) -> pyarrow.Array:
    kind = pyarrow.list_(TEXT)
    if pyarrow.types.is_list(labels.type):
        return labels.cast(kind)
    single = [None if label is None else [label] for label in labels.to_pylist()]
    return pyarrow.array(single, kind)


def _compact(values: pyarrow.Array) -> pyarrow.Array:
    """Each distinct string once."""
    if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
        return values.dictionary_encode()
    return values
