"""Files that need pickle, for `moce convert --trust-pickle` and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from moce.errors import MoceError
from moce.weights.read import unwrap
from moce.weights.types import RawWeights


def read_trusted(path: Path) -> RawWeights:
    """Like `read.read_raw`, for a file that the user trusts: pickle may run code in the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling may raise anything
        raise MoceError(f"cannot read {path}: {error}") from None
    return unwrap(content, path)
