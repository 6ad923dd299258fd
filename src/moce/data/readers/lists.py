"""Lists of images and sources in text files, as people and programs write them.

One per line, or separated by zero bytes (find -print0). UTF-8 or UTF-16, with Windows' or Unix' ends of
lines; paths may be quoted, start with file://, have backslashes, and be followed by a label.
"""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from urllib.parse import unquote

from moce.data.readers.left_out import LeftOut, hidden_end
from moce.errors import MoceError

BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
LABEL = re.compile(r"(.+?)\s*[\s,;]\s*(\S+)")


def read_list(path: Path) -> list[str]:
    """The lines of a list, without empty ones, comments and hidden entries; says how many these are.

    Raises MoceError if it cannot be read or names nothing.
    """
    try:
        content = path.read_bytes()
        encoding = next((name for bom, name in BOMS.items() if content.startswith(bom)), "utf-8")
        text = content.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise MoceError(f"cannot read the list {path}: {error}") from None
    lines = [line.strip() for line in (text.split("\0") if "\0" in text else text.splitlines())]
    left_out = LeftOut(str(path))
    kept = [
        line
        for line in map(_plain, lines)
        if line and not line.startswith("#") and not left_out.is_hidden(hidden_end(line))
    ]
    left_out.report()
    if not kept:
        raise MoceError(f"the list {path} names no images")
    return kept


def _plain(line: str) -> str:
    """A line without quotes around it and without file://."""
    for quote in ("'", '"'):
        if len(line) > 1 and line.startswith(quote) and line.endswith(quote):
            line = line[1:-1]
    return unquote(line.removeprefix("file://")) if line.startswith("file://") else line


def expand_name(path: str) -> str:
    """A path with ~ replaced by the home folder."""
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib's raises for unknown users


def plain_path(path: str) -> str:
    """As pathlib writes a path, which would keep the name of every file that it has seen."""
    odd = ("//", "/./")
    plain = path and not path.startswith("./") and not path.endswith(("/", "/."))
    if os.sep == "/" and plain and path != "." and not any(part in path for part in odd):
        return path
    return Path(path).as_posix()


def path_and_label(line: str, folder: Path) -> tuple[str, str | None]:
    """The path on a line and the label after it, if that makes it a path that exists."""
    found = LABEL.fullmatch(line)
    candidates: list[tuple[str, str | None]] = [(line, None)]
    if found:
        candidates.append((_plain(found[1]), found[2]))
    for path, label in candidates:
        for written in dict.fromkeys((path, path.replace("\\", "/"))):
            # pathlib's raises for long names.
            if os.path.exists(os.path.join(folder, written)):  # noqa: PTH110, PTH118
                return written, label
    return line, None
