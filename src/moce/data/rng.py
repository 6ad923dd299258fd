"""Counter-based random numbers keyed by (seed, epoch, image).

They do not depend on the order of images, batch, worker or process, so a resumed, re-batched or
distributed run draws the same numbers as an uninterrupted one on one process.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The purpose of the numbers; streams are independent of each other."""

    ORDER = 1
    MASK = 2
    CROP = 3
    GATE = 4
    STEP = 6
    POLICY = 7
    TOKEN = 8
    MIX = 9
    REPLACEMENT = 10
    ANCHOR = 11
    PROPOSAL = 12
    DROP_PATH = 13


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MULTIPLY = (-4658895280553007687, -7723592293110705685)  # splitmix64's two constants


def _mix(state: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64 (arithmetic wraps; shifts are made logical by masks)."""
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * _MULTIPLY[0]
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * _MULTIPLY[1]
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def _key(seed: int, stream: Stream) -> int:
    """The key of a stream, as an int: a tensor would have to be copied to the device."""
    return int(_mix(torch.tensor(seed) * _GOLDEN + int(stream)))


def keyed_uniform(seed: int, stream: Stream, epochs: Tensor, images: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1): row i depends on (seed, stream, epochs[i], images[i]) only.

    epochs, images: [b] int64. Returns [b, count] float32 on their device.
    """
    row = _mix(_mix(_key(seed, stream) + images * _GOLDEN) + epochs * _GOLDEN)
    column = torch.arange(1, count + 1, device=images.device) * _GOLDEN
    bits = _mix(row[:, None] + column[None, :])
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def keyed_normal(seed: int, stream: Stream, epochs: Tensor, images: Tensor, count: int) -> Tensor:
    """As `keyed_uniform`, but from N(0, 1)."""
    uniform = keyed_uniform(seed, stream, epochs, images, count)
    wide = uniform.cpu() if uniform.device.type == "mps" else uniform  # MPS has no float64
    normal = torch.special.ndtri(wide.double() + 2**-25).float()  # never 0 nor 1
    return normal.to(uniform.device)


def keyed_generator(seed: int, stream: Stream, number: int) -> torch.Generator:
    """A CPU generator that depends on (seed, stream, number) only, for what is not per image."""
    state = _mix(_key(seed, stream) + torch.tensor(number) * _GOLDEN)
    return torch.Generator().manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)
