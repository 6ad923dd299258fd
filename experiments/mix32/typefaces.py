"""Typefaces that Mix-32 draws characters with, from npm packages, and which of them hold a character.

All are openly licensed: by their packages under the SIL Open Font License 1.1, but Homemade Apple,
Kosugi Maru and Schoolbell under the Apache License 2.0 (upstream, Ubuntu has its own free license).
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import ImageFont
from tools.image_sources import Package, fetch, members, require

NO_CHARACTER = "\U0010fffe"  # never assigned: drawn as the box for a missing glyph
PROBE_SIZE = 64  # pixels


@dataclass(frozen=True)
class Face:
    """One font file: a family in one weight, with the characters of one script."""

    family: str
    name: str
    content: bytes

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels."""
        layout = ImageFont.Layout.BASIC  # the same with and without libraqm
        return ImageFont.truetype(io.BytesIO(self.content), size, layout_engine=layout)


def packages() -> dict[str, Package]:
    """The npm package of every family, from typefaces.txt."""
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: Package(f"@fontsource/{name}", version, sha) for name, version, sha in rows}


def faces(cache: Path, families: tuple[str, ...], script: str, characters: str) -> list[Face]:
    """Every upright weight of the families in one script; all of them must draw all characters."""
    found = []
    for family in families:
        archive = fetch(packages()[family], cache)
        upright = re.compile(rf"{re.escape(family)}-{script}-\d+-normal\.woff")
        kept = [
            Face(family, name, unpacked(content))
            for name, content in sorted(members(archive, "files"))
            if upright.fullmatch(name)
        ]
        require(bool(kept), f"{family} has no {script} fonts")
        found += kept
    for face in found:
        missing = missing_characters(face, characters)
        require(not missing, f"{face.name} cannot draw {missing}")
    return found


def unpacked(woff: bytes) -> bytes:
    """The same font uncompressed, which opens in no time."""
    font = TTFont(io.BytesIO(woff), recalcTimestamp=False)
    font.flavor = None
    file = io.BytesIO()
    font.save(file, reorderTables=None)
    return file.getvalue()


def missing_characters(face: Face, characters: str) -> str:
    """Characters that a font draws as nothing, as its missing-glyph box, or like an earlier one."""
    font = face.at(PROBE_SIZE)
    seen = {drawn(font, NO_CHARACTER), drawn(font, " ")}
    missing = ""
    for character in characters:
        picture = drawn(font, character)
        if picture in seen:
            missing += character
        seen.add(picture)
    return missing


def drawn(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """The ink of a character."""
    mask = font.getmask(character)
    return repr(mask.size).encode() + bytes(mask)
