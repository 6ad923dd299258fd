"""Semantic masks in PNG files: the value of every pixel is its class; palette or gray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from moce.data.decode import Raster, upright_size
from moce.data.readers.sample import error_line
from moce.dense.images import mask_values
from moce.dense.readers.layouts import UNKNOWN, VALUES, Layout, find_layout
from moce.dense.readers.objects import in_threads, raise_above_share
from moce.dense.readers.pairs import image_samples
from moce.dense.types import IGNORE, DenseSample, DenseSource
from moce.errors import MoceError

Opener = Callable[[], Raster]
Found = tuple[tuple[int, int], frozenset[int]]  # (h, w) and the values of a mask


def read_masks(
    root: Path, annotations: Path | None, max_skipped: float, ignore_index: int | None
) -> DenseSource:
    """The images of a folder that have masks. Raises MoceError if they cannot be used."""
    layout = find_layout(root, annotations)
    if layout is None:
        raise MoceError(
            f"no masks in {root}: give images/ and masks/ with PNG files of the same names"
        )
    image_samples(root, report=True)
    return masked_source(str(root), layout, max_skipped, ignore_index)


def masked_source(
    name: str, layout: Layout, max_skipped: float, ignore_index: int | None
) -> DenseSource:
    """The source of all pairs whose masks hold known classes in the size of their image.

    ignore_index: a further value that does not count. Reads every mask once.
    """
    table = layout.table.copy()
    if ignore_index is not None:
        if not 0 <= ignore_index < VALUES:
            raise MoceError(f"ignore_index {ignore_index} is not a value of a mask (0 to 255)")
        table[ignore_index] = IGNORE
    usable = [p for p in layout.pairs if p.image is not None and p.mask is not None]
    faults = [
        (p.id, f"missing file: no {'image' if p.image is None else 'mask'}")
        for p in layout.pairs
        if p.image is None or p.mask is None
    ]
    opened = [(p.image.open, p.mask.open) for p in usable if p.image and p.mask]
    inspected = in_threads("check masks", [partial(_inspect, *pair, table) for pair in opened])
    samples: list[DenseSample] = []
    seen: set[int] = set()
    for pair, (image, mask), found in zip(usable, opened, inspected, strict=True):
        if isinstance(found, str):
            faults.append((pair.id, found))
            continue
        size, values = found
        seen |= values
        target = partial(class_mask, mask, table)
        samples.append(DenseSample(pair.id, image, target, pair.split, size))
    raise_above_share(name, "images", faults, len(layout.pairs), max_skipped)
    classes = layout.classes or _numbered(name, seen, ignore_index)
    return DenseSource(name, "segment", classes, samples, skipped=faults)


def _numbered(name: str, values: set[int], ignore_index: int | None) -> list[str]:
    """Names for classes that no file names: their numbers, up to the largest that a mask holds."""
    if values <= {0, IGNORE}:
        raise MoceError(
            f"the masks of {name} hold no value but 0 and {IGNORE}, and {IGNORE} does not count; "
            "save the classes as 0, 1, 2, ..."
        )
    largest = max(value for value in values if value not in (IGNORE, ignore_index))
    return [str(value) for value in range(largest + 1)]


def _inspect(open_image: Opener, open_mask: Opener, table: np.ndarray) -> Found | str:
    """The size and values of a mask, or why it cannot be used."""
    try:
        image = open_image()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            size = upright_size(image)
        values = mask_values(open_mask())
    except FileNotFoundError:
        return "missing file"
    except Exception as error:  # decoders raise errors of any type
        return error_line(error)
    if values.shape != size:
        return f"mask of another size: {list(values.shape)} for an image of {list(size)} (h, w)"
    present = np.unique(values)
    strange = [v for v in present.tolist() if not 0 <= v < VALUES or table[v] == UNKNOWN]
    if strange:
        return f"unknown class: value {strange[0]}"
    if (table[present] == IGNORE).all():
        return "nothing labeled: no pixel counts"
    return size, frozenset(present.tolist())


def class_mask(open_mask: Opener, table: np.ndarray) -> np.ndarray:
    """[h, w] int64 of a mask: classes and `IGNORE`."""
    return table[mask_values(open_mask())]
