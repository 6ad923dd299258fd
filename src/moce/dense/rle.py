"""Masks in COCO's packed run lengths, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moce.dense.types import RLE
from moce.errors import MoceError

Size = tuple[int, int]


def mask_library() -> Any:
    """faster-coco-eval's mask functions. Raises MoceError if it is not installed."""
    try:
        from faster_coco_eval import mask
    except ImportError:
        raise MoceError("boxes and masks need a library: pip install 'moce[dense]'") from None
    return mask


def encode(masks: np.ndarray) -> list[RLE]:
    """One RLE per mask; masks: [n, h, w] bool or uint8."""
    if not len(masks):
        return []
    columns_first = np.asfortranarray(np.moveaxis(masks, 0, -1).astype(np.uint8))
    return list(mask_library().encode(columns_first))


def decode(masks: Sequence[RLE], size: Size) -> np.ndarray:
    """[n, h, w] bool of RLEs of size (h, w). Raises ValueError for damaged ones."""
    if not masks:
        return np.zeros((0, *size), bool)
    return np.moveaxis(mask_library().decode(list(masks)), -1, 0).astype(bool)


def from_polygons(polygons: Sequence[np.ndarray], size: Size) -> RLE:
    """The mask that polygons (x, y, x, y, ... in pixels) fill together, in an image of size (h, w)."""
    library = mask_library()
    return library.merge(library.frPyObjects([p.tolist() for p in polygons], *size))


def checked(mask: dict[str, Any], size: Size) -> RLE:
    """A mask of a COCO file, packed or as a list of run lengths, as an RLE.

    Raises ValueError if it is damaged, or not of size (h, w).
    """
    stated = [int(n) for n in mask["size"]]
    if stated != list(size):
        raise ValueError(f"mask of another size: {stated} in an image of {list(size)} (h, w)")
    library, counts = mask_library(), mask["counts"]
    try:
        if isinstance(counts, list):
            packed = library.frPyObjects({"size": stated, "counts": counts}, *size)
        else:
            content = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
            packed = {"size": stated, "counts": content}
        pixels = library.decode(packed)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"damaged mask: {error}") from None
    if pixels.shape != size:
        raise ValueError("damaged mask: its run lengths do not fill it")
    return packed


def areas(masks: Sequence[RLE]) -> np.ndarray:
    """[n] float64: pixels of each mask."""
    return np.asarray(mask_library().area(list(masks)) if masks else [], np.float64)


def boxes(masks: Sequence[RLE]) -> np.ndarray:
    """[n, 4] float32: the smallest box (x1, y1, x2, y2) around each mask."""
    if not masks:
        return np.zeros((0, 4), np.float32)
    found = np.asarray(mask_library().toBbox(list(masks)), np.float32).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    return found
