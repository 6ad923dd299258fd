"""How long training waits for a checkpoint that is written in the background.

    python -m benchmarks.checkpoints        # a minute on an idle machine, 3 GB of disk
    python -m benchmarks.draw               # the tables of docs/performance.md

The state is that of an MAE and its AdamW after a step. Beside it: one copy of it in memory, and the same
checkpoint with training waiting for the file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import moce.training.checkpoint as checkpoint
from benchmarks.candidates import SIZES
from benchmarks.measure import FOLDER, MEGABYTE, Row, chosen, keep, options
from moce.training.checkpoint import Checkpoint, CheckpointWriter
from moce.training.optimizer import adamw, parameter_groups

RESULTS = FOLDER / "checkpoints.json"
PACKAGES = ("moce", "torch", "safetensors")
COPY, WAITS, DONE = "one copy in memory", "training waits", "until the file is complete"
WHOLE = "training waits for the file"
PARTS = {"vit_b": 5}
SHORT = {"vit_b": 1, "test": 2}


def state_of(size: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    torch.manual_seed(0)
    model = SIZES[size].spec().build()
    optimizer = adamw(parameter_groups(model.parameters(), 0.05), 0.95)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measured(size: str, repeats: int, folder: Path) -> list[Row]:
    model, optimizer = state_of(size)
    tensors = checkpoint._tensors_of(Checkpoint(0), model, optimizer)
    megabytes = sum(value.nbytes for value in tensors.values()) / MEGABYTE
    rows: list[Row] = []

    def note(candidate: str, repeat: int, start: float) -> None:
        seconds = time.perf_counter() - start
        rows.append({"candidate": candidate, "repeat": repeat, "seconds": seconds, "mb": megabytes})
        print(f"{size:8} {candidate:32} {seconds:9.4f} s", flush=True)

    for repeat in range(repeats):
        start = time.perf_counter()
        copied = [value.clone() for value in tensors.values()]
        note(COPY, repeat, start)
        del copied
        with CheckpointWriter(folder) as writer:
            start = time.perf_counter()
            writer.save(Checkpoint(2 * repeat + 1), model, optimizer)
            note(WAITS, repeat, start)
            writer.wait()
            note(DONE, repeat, start)
            share, checkpoint.MEMORY_SHARE = checkpoint.MEMORY_SHARE, 0
            start = time.perf_counter()
            writer.save(Checkpoint(2 * repeat + 2), model, optimizer)
            note(WHOLE, repeat, start)
            checkpoint.MEMORY_SHARE = share
    return rows


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    for size, usual in chosen(asked.only, SHORT if asked.short else PARTS).items():
        with tempfile.TemporaryDirectory(dir=asked.out.parent) as folder:
            rows = measured(size, asked.repeats or usual, Path(folder))
        keep(asked.out, size, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
