"""Samples kept as columns: a few dozen bytes per image, however many a source has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import overload

import numpy as np
import pyarrow
import pyarrow.compute

from moce.data.readers.sample import Encoded, Label, Sample

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
