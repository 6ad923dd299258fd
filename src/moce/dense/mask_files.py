"""Masks of pixels as PNG files, and the names of their classes, as `dense/readers/layouts.py` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moce.dense.pictures import PALETTE
from moce.runs.files import atomic, write_text


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write the class of every pixel, [h, w], as a PNG whose values are the classes; a palette colors them."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(PALETTE)
    with atomic(path) as temporary:
        image.save(temporary, "PNG")


def write_class_names(folder: Path, classes: Sequence[str]) -> None:
    """Write classes.txt: the name of class 0 in the first line, and so on."""
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes))
