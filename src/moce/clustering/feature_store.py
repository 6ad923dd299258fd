"""Features of all images in a file of the run's state: larger than memory, kept over a kill.

A process holds its share of them (`own_share`). They are extracted batch by batch, then centered and
scaled to unit norm where they are. What has been done is on record beside them:

state/features-0-of-1            float32 [n, width], as they come
state/features-0-of-1.json       how many are extracted, their mean once it is known, whether centered
state/features-0-of-1.chunk      the chunk that is being centered, in case of a kill in the middle
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

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

RECORD_EVERY = 10.0  # seconds of extraction that a kill may cost
CENTERED_AT_ONCE = 16384  # features


@dataclass
class Record:
    """done: rows extracted; mean: of the features of all processes; centered: whether all are unit."""

    done: int = 0
    mean: list[float] | None = None
    centered: bool = False


class FeatureFile:
    """The features of this process's share of the images, [count, width] float32."""

    def __init__(self, folder: Path, count: int, width: int) -> None:
        """Open the file or begin it. Raises MoceError if the disk has no room for it."""
        state = folder / STATE
        state.mkdir(parents=True, exist_ok=True)
        self.path = state / f"features-{rank()}-of-{world_size()}"
        self.count, self.width = count, width
        self.record = self._read()
        self._chunk = self.path.with_suffix(".chunk")

    @property
    def done(self) -> int:
        """Rows that are extracted."""
        return self.record.done

    def fill(self, batches: Iterable[Tensor], stop: Callable[[], bool]) -> bool:
        """Append the batches that are still missing; whether all are there: else `stop` said so."""
        done, recorded = self.done, time.monotonic()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(done * self.width * 4)
            for batch in batches:
                file.write(batch.contiguous().numpy().data)
                done += len(batch)
                stopped = stop()
                if stopped or time.monotonic() - recorded > RECORD_EVERY:
                    self._note(file, done)
                    recorded = time.monotonic()
                if stopped:
                    break
            self._note(file, done)
        return done == self.count

    def _note(self, file: object, done: int) -> None:
        """Put on record that rows are there, once they are."""
        file.flush()  # type: ignore[attr-defined]
        os.fsync(file.fileno())  # type: ignore[attr-defined]
        self.record.done = done
        self._write()

    def tensor(self) -> Tensor:
        """All features, [count, width] float32, mapped from the file: what is written to it is kept."""
        mapped = np.memmap(self.path, np.float32, "r+", shape=(self.count, self.width))
        return torch.from_numpy(mapped)

    def center(self) -> Tensor:
        """Center the features of all processes on their mean and scale to unit norm; the mean [width].

        In place, and only once: after a kill it goes on where it was.
        """
        features = self.tensor()
        everywhere = all_reduce(torch.tensor(self.record.mean is not None, dtype=torch.int64))
        if everywhere < world_size():
            self.record.mean = mean_of(features).tolist()
            self._write()
            barrier()  # nobody changes features while somebody may still need the mean
        assert self.record.mean is not None
        mean = torch.tensor(self.record.mean)
        if not self.record.centered:
            self._center(features, mean)
            self.record.centered = True
            self._write()
            self._chunk.unlink(missing_ok=True)
        return mean

    def _center(self, features: Tensor, mean: Tensor) -> None:
        done = 0
        if self._chunk.is_file():
            found = read_tensors(self._chunk)
            done = int(found["end"])
            features[done - len(found["features"]) : done] = found["features"]
        for part in chunks(self.count - done, CENTERED_AT_ONCE):
            own = slice(done + part.start, done + part.stop)
            centered = unit(features[own], mean)
            with atomic(self._chunk) as temporary:
                save_file({"features": centered, "end": torch.tensor(own.stop)}, temporary)
            features[own] = centered

    def _read(self) -> Record:
        record = self.path.with_suffix(".json")
        if not record.is_file() or not self.path.is_file():
            self._check_room()
            return Record()
        try:
            found = Record(**json.loads(record.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            return Record()
        whole = self.path.stat().st_size >= found.done * self.width * 4
        return found if whole else Record()

    def _check_room(self) -> None:
        needed = self.count * self.width * 4
        if needed > shutil.disk_usage(self.path.parent).free:
            raise MoceError(
                f"the features take {needed / 1e9:.1f} GB, more than is free in {self.path.parent}"
            )

    def _write(self) -> None:
        with atomic(self.path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(asdict(self.record)), encoding="utf-8")


def mean_of(features: Tensor) -> Tensor:
    """The mean of the features of all processes, [width] float32, summed in float64."""
    sums = torch.zeros(features.shape[1] + 1, dtype=torch.float64)
    for part in chunks(len(features), CENTERED_AT_ONCE):
        sums[:-1] += features[part].sum(dim=0, dtype=torch.float64)
    sums[-1] = len(features)
    all_reduce(sums)
    return (sums[:-1] / sums[-1]).float()
