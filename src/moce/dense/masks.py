"""Masks as COCO's run lengths, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moce.dense.types import RLE


def decode_masks(masks: Sequence[RLE]) -> Tensor:
    """Masks [n, h, w] uint8, 0 or 1, of at least one RLE, all of the same size."""
    from faster_coco_eval.core.mask import decode

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(decode(list(masks)), -1, 0)))


def encode_mask(mask: np.ndarray) -> RLE:
    """The RLE of a mask [h, w] bool or uint8."""
    from faster_coco_eval.core.mask import encode

    return encode(np.asfortranarray(mask, np.uint8))
