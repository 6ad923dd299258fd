"""Extracted features on disk, resumable: larger than memory, kept if the run is killed.

Every process stores its shard of the features. They are extracted batch by batch, then centered and
scaled to unit norm in place. Files, of rank 0 of 1:

state/features-0-of-1            float32 [n, width]
state/features-0-of-1.json       progress (`Progress`)
state/features-0-of-1.chunk      the chunk being centered, to redo it after a kill
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moce.clustering.features import chunks
from moce.errors import MoceError
from moce.models.cluster_model import unit
from moce.runs.files import atomic, read_tensors
from moce.runs.model import STATE
from moce.runtime.distributed import all_reduce, barrier, rank, world_size

SAVE_EVERY = 10.0  # seconds of extraction that a kill may cost
CHUNK_SIZE = 16384  # features centered at a time


@dataclass
class Progress:
    """done: rows extracted. mean: of all processes' features. centered: all rows are unit."""

    done: int = 0
    mean: list[float] | None = None
    centered: bool = False


class FeatureFile:
    """The features of this process's shard of the images, [count, width] float32."""

    def __init__(self, folder: Path, count: int, width: int) -> None:
        """Open the file in a run folder, or start it. Raises MoceError if the disk has no room."""
        state = folder / STATE
        state.mkdir(parents=True, exist_ok=True)
        self.path = state / f"features-{rank()}-of-{world_size()}"
        self.count, self.width = count, width
        self.progress = self._load_progress()
        self._chunk = self.path.with_suffix(".chunk")

    @property
    def done(self) -> int:
        """Rows that are extracted."""
        return self.progress.done

    def fill(self, batches: Iterable[Tensor], stop: Callable[[], bool]) -> None:
        """Append the missing batches, until `stop` returns True."""
        done, saved = self.done, time.monotonic()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(done * self.width * 4)
            for batch in batches:
                file.write(batch.contiguous().numpy().data)
                done += len(batch)
                stopped = stop()
                if stopped or time.monotonic() - saved > SAVE_EVERY:
                    self._sync(file, done)
                    saved = time.monotonic()
                if stopped:
                    break
            self._sync(file, done)

    def _sync(self, file: BinaryIO, done: int) -> None:
        """Flush the rows to disk, then record that they are there."""
        file.flush()
        os.fsync(file.fileno())
        self.progress.done = done
        self._save_progress()

    def tensor(self) -> Tensor:
        """All features, [count, width] float32, mapped from the file: writes go to the file."""
        mapped = np.memmap(self.path, np.float32, "r+", shape=(self.count, self.width))
        return torch.from_numpy(mapped)

    def center(self) -> Tensor:
        """Center the features of all processes on their mean, scale to unit norm; the mean [width].

        In place, and only once; resumes after a kill.
        """
        features = self.tensor()
        known = all_reduce(torch.tensor(self.progress.mean is not None, dtype=torch.int64))
        if known < world_size():
            self.progress.mean = mean_of(features).tolist()
            self._save_progress()
            barrier()  # nobody changes features while another process still computes the mean
        assert self.progress.mean is not None
        mean = torch.tensor(self.progress.mean)
        if not self.progress.centered:
            self._center(features, mean)
            self.progress.centered = True
            self._save_progress()
            self._chunk.unlink(missing_ok=True)
        return mean

    def _center(self, features: Tensor, mean: Tensor) -> None:
        done = 0
        if self._chunk.is_file():
            found = read_tensors(self._chunk)
            done = int(found["end"])
            features[done - len(found["features"]) : done] = found["features"]
        for where in chunks(self.count, CHUNK_SIZE, done):
            centered = unit(features[where], mean)
            with atomic(self._chunk) as temporary:
                save_file({"features": centered, "end": torch.tensor(where.stop)}, temporary)
            features[where] = centered

    def _load_progress(self) -> Progress:
        file = self.path.with_suffix(".json")
        if not file.is_file() or not self.path.is_file():
            self._check_room()
            return Progress()
        try:
            content = json.loads(file.read_text(encoding="utf-8").replace("centred", "centered"))
            found = Progress(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            return Progress()
        complete = self.path.stat().st_size >= found.done * self.width * 4
        return found if complete else Progress()

    def _check_room(self) -> None:
        needed = self.count * self.width * 4
        if needed > shutil.disk_usage(self.path.parent).free:
            raise MoceError(
                f"the features take {needed / 1e9:.1f} GB, more than is free in {self.path.parent}"
            )

    def _save_progress(self) -> None:
        with atomic(self.path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")


def mean_of(features: Tensor) -> Tensor:
    """The mean of the features of all processes, [width] float32, summed in float64."""
    sums = torch.zeros(features.shape[1] + 1, dtype=torch.float64)
    for where in chunks(len(features), CHUNK_SIZE):
        sums[:-1] += features[where].sum(dim=0, dtype=torch.float64)
    sums[-1] = len(features)
    all_reduce(sums)
    return (sums[:-1] / sums[-1]).float()
