"""A value of each image as a column: a few bytes per image, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow
import pyarrow.compute

from moce.data.readers.sample import Label

BLOCK = 2**14  # rows turned into Python values at a time
TEXT = pyarrow.string()
V = TypeVar("V")


class Column(Sequence[V], Generic[V]):
    """A value of each image, kept by pyarrow: Python's objects are made when they are asked for.

    Equal to a list of the same values. Lists of labels become tuples.
    """

    def __init__(self, values: pyarrow.Array | pyarrow.ChunkedArray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)

    @overload
    def __getitem__(self, row: int) -> V: ...
    @overload
    def __getitem__(self, row: slice) -> list[V]: ...
    def __getitem__(self, row: int | slice) -> V | list[V]:
        if isinstance(row, int):
            return plain(self.values[range(len(self))[row]].as_py())
        start, stop, step = row.indices(len(self))
        if step != 1:
            return [self[number] for number in range(start, stop, step)]
        return list(values_of(self.values.slice(start, max(0, stop - start))))

    def __iter__(self) -> Iterator[V]:
        for start in range(0, len(self), BLOCK):
            yield from values_of(self.values.slice(start, BLOCK))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Column({self[:3]} ..., {len(self)} values)"

    def take(self, rows: np.ndarray) -> Column[V]:
        """The values of these rows, [m] int64."""
        return Column(self.values.take(indices(rows)))


def indices(rows: np.ndarray) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(rows), [None, pyarrow.py_buffer(rows)])


def take(values: Sequence[V], rows: np.ndarray) -> Sequence[V]:
    """The values of these rows, [m] int64."""
    return values.take(rows) if isinstance(values, Column) else [values[r] for r in rows.tolist()]


def values_of(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    """The values of a column, with one object for all that are equal."""
    if isinstance(column, pyarrow.ChunkedArray):
        return [value for chunk in column.chunks for value in values_of(chunk)]
    if not pyarrow.types.is_dictionary(column.type):
        return [*map(plain, column.to_pylist())]
    values = dict(enumerate(column.dictionary.to_pylist()))
    return [values.get(number) for number in column.indices.to_pylist()]


def plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def are_lists(kind: pyarrow.DataType) -> bool:
    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def plain_column(
    values: pyarrow.Array | pyarrow.ChunkedArray, kind: pyarrow.DataType = TEXT
) -> pyarrow.Array:
    """A column without dictionary, of strings or, each in a list of its own, of lists."""
    if isinstance(values, pyarrow.ChunkedArray):
        values = values.combine_chunks()
    if not are_lists(kind) or are_lists(values.type):
        return values.cast(kind)
    return pyarrow.ListArray.from_arrays(
        _offsets(values.is_valid().to_numpy(zero_copy_only=False)),
        values.cast(TEXT).drop_null(),
        mask=values.is_null(),
    )


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
        return text_column(labels)  # type: ignore[arg-type]
    lists = [(x,) if isinstance(x, str) else x for x in labels]
    sizes = [len(x or ()) for x in lists]
    return pyarrow.ListArray.from_arrays(
        _offsets(sizes),
        text_column([name for x in lists for name in x or ()]).cast(TEXT),
        mask=pyarrow.compute.is_null(text_column([None if x is None else "" for x in lists])),
    )


def compact(values: pyarrow.Array | pyarrow.ChunkedArray) -> pyarrow.Array:
    """Each distinct string once."""
    if isinstance(values, pyarrow.ChunkedArray):
        values = values.combine_chunks()
    if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
        return values.dictionary_encode()
    if pyarrow.types.is_list(values.type) and not pyarrow.types.is_dictionary(
        values.type.value_type
    ):
        inner = values.flatten().dictionary_encode()
        sizes = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(values), 0)
        offsets = _offsets(sizes.to_numpy(zero_copy_only=False))
        return pyarrow.ListArray.from_arrays(offsets, inner, mask=values.is_null())
    return values


def _offsets(sizes: Sequence[int] | np.ndarray) -> pyarrow.Array:
    """Where lists of these sizes start and end."""
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pyarrow.Array.from_buffers(pyarrow.int32(), len(ends), [None, pyarrow.py_buffer(ends)])
