"""What a page is made of. Sections hold blocks; the template knows how to draw each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Picture:
    """An inlined image. uri: a data URI; width, height: its own pixels; alt: what it shows, in words.

    pixelated: keep pixels square when enlarged, for images smaller than their place.
    """

    uri: str
    width: int
    height: int
    alt: str
    pixelated: bool = False


@dataclass(frozen=True)
class Chip:
    """A small colored label, such as an expert's number."""

    text: str
    color: str
    ink: str = "#fff"


@dataclass(frozen=True)
class Cell:
    """A table cell. note: set smaller behind the text; strong: the best of its row."""

    text: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Note:
    """A paragraph. title: set above it, if given."""

    kind: ClassVar[str] = "note"
    text: str
    title: str = ""


@dataclass(frozen=True)
class Tiles:
    """Numbers to see first: (number, what it is)."""

    kind: ClassVar[str] = "tiles"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    kind: ClassVar[str] = "chart"
    picture: Picture
    caption: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """The first cell of every row is its header. groups: (title, columns) above the columns.

    folded: shown only when the reader opens it; last_apart: the last row sums up the others.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    groups: Sequence[tuple[str, int]] = ()
    folded: bool = False
    last_apart: bool = False
    numbers: bool = True


@dataclass(frozen=True)
class Item:
    """A montage with its heading. picture: None where the images cannot be had."""

    title: str
    note: str
    picture: Picture | None
    chips: Sequence[Chip] = ()


@dataclass(frozen=True)
class Gallery:
    kind: ClassVar[str] = "gallery"
    items: Sequence[Item]
    title: str = ""


@dataclass(frozen=True)
class Comparison:
    """Columns of pictures side by side: one row of `columns` heads, one picture under each."""

    kind: ClassVar[str] = "comparison"
    title: str
    columns: Sequence[str]
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Beside:
    """Comparisons set beside each other where there is room."""

    kind: ClassVar[str] = "beside"
    items: Sequence[Comparison]


@dataclass(frozen=True)
class Facts:
    """Short facts under a heading: (name, value)."""

    kind: ClassVar[str] = "facts"
    title: str
    items: Sequence[tuple[str, str]]
    chips: Sequence[Chip] = ()


Block = Note | Tiles | Chart | Table | Gallery | Beside | Facts


@dataclass
class Section:
    """anchor: its place in the page's addresses; lead: one sentence on how to read it."""

    anchor: str
    title: str
    lead: str
    blocks: list[Block] = field(default_factory=list)
