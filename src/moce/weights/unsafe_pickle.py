"""Files that need pickle, for `moce convert --trust-pickle` and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from moce.errors import MoceError
from moce.weights.read import read_raw
from moce.weights.types import RawWeights


def read_trusted(path: Path, key: str | None = None) -> RawWeights:
    """Like `read.read_raw`, for a file that the user trusts: pickle may run code in the file."""
    return read_raw(path, key, _load)


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of TorchScript
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling may raise anything
        raise MoceError(f"cannot read {path}: {error}") from None
