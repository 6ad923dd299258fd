"""The elements of a page: sections of blocks, each drawn by a macro of the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Picture:
    """An inlined image.

    uri: a data URI; width, height: in pixels; alt: text alternative; pixelated: keep pixels square
    when enlarged.
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
    """A table cell. note: smaller, behind the text; strong: bold; chips: in front of the text."""

    text: str
    note: str = ""
    strong: bool = False
    chips: Sequence[Chip] = ()


Row = Sequence[Cell | Picture | str]


@dataclass(frozen=True)
class Note:
    """A highlighted paragraph."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Tiles:
    """Key numbers: (number, what it is)."""

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
    """The first cell of every row is its header.

    folded: closed until the reader opens it; last_apart: the last row sums up the others; numbers:
    align to the right.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    folded: bool = False
    last_apart: bool = False
    numbers: bool = True


@dataclass(frozen=True)
class Item:
    """A montage with its heading. picture: None if the images cannot be read."""

    title: str
    note: str
    picture: Picture | None
    chips: Sequence[Chip] = ()


@dataclass(frozen=True)
class Gallery:
    kind: ClassVar[str] = "gallery"
    items: Sequence[Item]
    title: str = ""


Block = Note | Tiles | Chart | Table | Gallery


@dataclass
class Section:
    """anchor: its id in the page; lead: one sentence on how to read it."""

    anchor: str
    title: str
    lead: str
    blocks: list[Block] = field(default_factory=list)
