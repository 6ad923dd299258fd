"""WebDataset's names in a tar file: which members are images, and which hold an image's label.

The parts of a sample share a key, the name up to its first dot. A later dot may belong to the name
(v1.0000.jpg, v1.0001.jpg are two images) or mark another part (0001.seg.png is no second image).
"""

from __future__ import annotations

from collections.abc import Iterable

from moce.data.readers.sample import is_image_name, suffix_of

LABEL_SUFFIXES = (".cls", ".json")
_PARTS = "seg mask masks label labels gt depth normal alpha edge edges thumb"
PARTS = frozenset(_PARTS.split())


def other_parts(names: Iterable[str]) -> dict[str, str]:
    """Names with an image's suffix that are another part of a sample, with their kind (".seg.png").

    One is if its last but one suffix is no number, and the sample has an image of the plain name;
    or, beside any other image of the sample, if that suffix is a usual one for labels.
    """
    return _parts(names, anything=True)


def usual_parts(names: Iterable[str]) -> dict[str, str]:
    """Like `other_parts`, by usual suffixes only: in a folder, 1.edited.jpg is another image."""
    return _parts(names, anything=False)


def _parts(names: Iterable[str], anything: bool) -> dict[str, str]:
    images = [name for name in names if is_image_name(name)]
    dotted = {key_of(name) for name in images if name.rpartition("/")[2].count(".") > 1}
    by_key: dict[str, list[str]] = {}
    for name in images if dotted else ():  # most sources have no such names
        if (key := key_of(name)) in dotted:
            by_key.setdefault(key, []).append(name)
    found: dict[str, str] = {}
    for key, members in by_key.items():
        marks = {name: stem_of(name)[len(key) :] for name in members}
        parts = {name for name, mark in marks.items() if mark[1:].casefold() in PARTS}
        if anything and "" in marks.values():
            parts |= {n for n, mark in marks.items() if mark and not _has_number(mark)}
        if len(parts) < len(members):
            found |= {name: marks[name] + suffix_of(name).lower() for name in parts}
    return found


def _has_number(mark: str) -> bool:
    return any(letter.isdigit() for letter in mark)


def key_of(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last.split(".")[0] or last)


def stem_of(name: str) -> str:
    """The path without its last suffix."""
    return name.removesuffix(suffix_of(name))


def label_names(name: str) -> list[str]:
    """The members that may hold the label of an image, those of its full name first."""
    stems = dict.fromkeys((stem_of(name), key_of(name)))
    return [stem + suffix for stem in stems for suffix in LABEL_SUFFIXES]
