"""A step of fine-tuning in chunks on threads beside the same step on whole batches.

    python -m benchmarks.finetune_step      # two minutes on 2 idle cores
    python -m benchmarks.draw               # the tables of docs/performance.md

A step has everything that follows the crops: mixup or cutmix, drop path, forward and backward passes,
AdamW. Both draw the same random numbers, so they compute the same gradients, up to rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.candidates import BETAS, SIZES, Case
from benchmarks.measure import FOLDER, Row, Work, chosen, in_turns, keep, options, per_second
from moce.config import FinetuneSettings
from moce.data.from_python import as_image_dataset
from moce.data.loader import Batch
from moce.evaluation.finetune import FinetuneObjective
from moce.training.drop_path import draw_drop_path, use_keyed_drop_path
from moce.training.optimizer import adamw, set_learning_rate
from moce.training.thread_parallel import Losses, ThreadParallel
from moce.training.trainer import Step

RESULTS = FOLDER / "finetune_step.json"
PACKAGES = ("moce", "torch", "timm")
WHOLE, CHUNKS = "whole batches", "chunks on threads"
CLASSES = 100
PARTS = {
    "tiny32": [Case("tiny32", batch, 2) for batch in (16, 64, 256)],
    "vit_ti": [Case("vit_ti", 16, 2)],
}
SHORT = {"test": [Case("test", 16)]}
REPEATS = {"tiny32": 15, "vit_ti": 5, "test": 2}


def step_of(case: Case, name: str) -> Work:
    """A training step, by one way of taking it, of a network of its own."""
    spec, side = SIZES[case.size].spec().encoder, SIZES[case.size].image
    vit = spec.build(num_classes=CLASSES, global_pool="avg", fc_norm=True, drop_path_rate=0.1)
    use_keyed_drop_path(vit.train())
    pixels = torch.randint(0, 256, (case.batch, 3, side, side), dtype=torch.uint8)
    images, rows = as_image_dataset(pixels, (side, side)), torch.arange(case.batch)
    labels = np.arange(case.batch) % CLASSES
    settings = FinetuneSettings(backbone="-", data="-", out=Path("-"), rand_augment="")
    objective = FinetuneObjective(vit, spec, images, labels, settings)
    optimizer = adamw(objective.parameter_groups, BETAS[1])
    set_learning_rate(optimizer, 1e-4)
    threads, size = ThreadParallel(vit), objective.chunk_size
    assert size is not None
    step = Step(0, rows)

    def work() -> None:
        batch = objective.prepared(Batch(rows, rows * 0, pixels), step)

        def loss(model: nn.Module, chunk: slice) -> Losses:
            own = batch.take(chunk)
            draw_drop_path(model, settings.seed, own)
            return objective.loss(model, own, step)

        if name == WHOLE:
            loss(vit, slice(None))["loss"].backward()
        else:
            threads.backward(loss, case.batch, size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def speed(case: Case, repeats: int) -> list[Row]:
    torch.set_num_threads(case.threads)
    work = {name: step_of(case, name) for name in (WHOLE, CHUNKS)}
    rows = in_turns(work, repeats, warmups=2)
    return per_second([row | vars(case) for row in rows], case.batch)


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    for name, part in chosen(asked.only, SHORT if asked.short else PARTS).items():
        rows = [row for case in part for row in speed(case, asked.repeats or REPEATS[case.size])]
        keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
