"""How an image is made to fit an encoder where nothing is random: timm's evaluation transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
KEYS = ("crop_pct", "interpolation", "crop_mode")  # of a pretrained_cfg


@dataclass(frozen=True)
class Fit:
    """size: (h, w). crop_pct: share of the resized image's sides that is kept, (0, 1].

    interpolation, crop_mode: as in timm. mean: per channel, 0..1, of the borders of crop mode border.
    """

    size: tuple[int, int]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    mean: tuple[float, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether images of the size stay as they are."""
        return self.crop_pct == 1


def stated_fit(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a pretrained_cfg says of it. Raises ValueError for values that are none."""
    found = {name: cfg[name] for name in KEYS if cfg.get(name) is not None}
    share = found.get("crop_pct", 1.0)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"crop_pct {share!r} is not a share above 0")
    for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if found.get(name, known[0]) not in known:
            raise ValueError(f"{name} {found[name]!r} is none of {', '.join(known)}")
    return found


def resolved_fit(
    stated: Mapping[str, Any], cfg: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    """crop_pct, interpolation and crop_mode: as stated, else as timm's `cfg` of the architecture says.

    Its crop_pct belongs to its input size; at another size the whole of the shorter side is kept.
    """
    known = {name: cfg[name] for name in KEYS if cfg.get(name) is not None}
    if tuple(cfg.get("input_size", ())[1:]) != tuple(size):
        known["crop_pct"] = 1.0
    usual = {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"}
    return {**usual, **known, **stated}
