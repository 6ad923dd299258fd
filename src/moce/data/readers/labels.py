"""What a value, a column or a text says of an image's class: the one definition for every reader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moce.data.readers.sample import Label

# Names of columns and keys, the preferred ones first.
IMAGES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "class", "cls", "class_name", "category", "target", "y")
SPLITS = ("split", "splits", "subset", "partition")
NO_LABEL = frozenset({"", "-1", "nan", "null"})  # as text, in lower case


def pick(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The name among these that comes first in `wanted`, whatever its case."""
    by_word = {name.casefold(): name for name in reversed(list(names))}
    return next((by_word[word] for word in wanted if word in by_word), None)


def label_of(value: Any) -> Label | None:
    """The label that a value stands for: several classes for a list.

    None for no label: -1, NaN, null, empty text. Whole floats are class numbers: a column with gaps
    becomes floats in pandas.
    """
    if isinstance(value, list | tuple):
        return _classes(map(label_of, value))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    return None if text.casefold() in NO_LABEL else text


def _classes(labels: Iterable[Label | None]) -> tuple[str, ...]:
    return tuple(sorted({str(label) for label in labels if label is not None}, key=in_order))


def column_labels(
    values: Sequence[Any], name_of: Callable[[Any], Any] | None = None
) -> list[Label | None]:
    """The labels of a column. name_of: the class of a value or, for lists of 0 and 1, of a place.

    Lists of 0 and 1, all of one length, mark the classes of an image.
    """
    named = name_of or (lambda value: value)
    if _are_marks(values):
        return [
            None
            if marks is None
            else _classes(label_of(named(place)) for place, mark in enumerate(marks) if mark)
            for marks in values
        ]

    def label(value: Any) -> Label | None:
        if isinstance(value, list | tuple):
            return _classes(map(label, value))
        return None if label_of(value) is None else label_of(named(value))

    return [label(value) for value in values]


def _are_marks(values: Sequence[Any]) -> bool:
    lists = [value for value in values if value is not None]
    if not lists or not all(isinstance(value, list | tuple) for value in lists):
        return False
    return {len(value) for value in lists} == {len(lists[0])} and len(lists[0]) > 1 and all(
        isinstance(mark, int | float) and mark in (0, 1) for value in lists for mark in value
    )  # fmt: skip


def from_text(text: str, suffix: str = ".cls") -> Label | None:
    """The label in a text file beside an image: the text, or of JSON the value or its label."""
    if suffix != ".json":
        return label_of(text)
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if isinstance(content, dict):
        key = pick(content, LABELS)
        content = content[key] if key is not None else None
    return None if isinstance(content, dict) else label_of(content)


def in_order(name: str) -> tuple[float, str]:
    """Sorts classes: numbers by value, then names."""
    try:
        value = float(name)
    except ValueError:
        value = math.inf
    return (value if math.isfinite(value) else math.inf, name)
