"""moce evaluate on tasks to detect and to segment: settings of their fine-tuning, and rows of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moce.commands.setup import pixel_file
from moce.config import EvaluateSettings
from moce.data.load import load_images
from moce.data.readers.sample import Sample
from moce.dense.dataset import split
from moce.dense.examples import EXAMPLES
from moce.dense.readers import read_dense
from moce.dense.types import DenseTask
from moce.evaluation.backbones import Candidate
from moce.evaluation.results import make_row, read_rows
from moce.evaluation.suite import Suite, SuiteTask
from moce.evaluation.task import Task

LINEAR: dict[str, Any] = {"freeze": "backbone", "head_args": {"kind": "linear"}}


def finetune_settings(plan: SuiteTask, suite: Suite, protocol: str) -> dict[str, Any]:
    """The settings of `moce finetune` that the suite and the protocol of a row give."""
    section = suite.detect if plan.task == "detect" else suite.segment
    linear = LINEAR if protocol == "segment_linear" else {}
    return {**section, "task": plan.task, "annotations": plan.annotations, **linear}


def as_task(plan: SuiteTask, shape: tuple[int, int, int], settings: EvaluateSettings) -> Task:
    """The images alone, [c, h, w], as a task to select and adapt backbones by."""
    kind: DenseTask = "detect" if plan.task == "detect" else "segment"
    place = None if plan.annotations is None else Path(plan.annotations)
    source = read_dense(plan.data, kind, place, settings.max_skipped)
    train, _ = split(source, shape[0])
    samples = [Sample(sample.id, sample.open) for sample in train.samples]
    store, share = pixel_file(settings), settings.max_skipped
    images = load_images(samples, shape[1:], store, channels=shape[0], max_skipped=share)
    none = np.zeros(0, np.int64)
    return Task(plan.data, source.classes, images, images.subset([]), none, none)


def row_of_runs(
    plan: SuiteTask, candidate: Candidate, protocol: str, runs: list[Path], out: Path
) -> dict[str, Any]:
    """The row of a candidate from those of its runs, one per draw.

    figures: the means of all figures; examples: test images with the prediction of the first run.
    """
    rows = [read_rows(run)[0] for run in runs]
    names = dict.fromkeys(name for row in rows for name in row["figures"])
    figures = {
        name: float(np.mean([row["figures"][name] for row in rows if name in row["figures"]]))
        for name in names
    }
    return make_row(
        task=plan.name,
        data=plan.data,
        backbone=candidate.name,
        reference=candidate.reference,
        selection=candidate.selection,
        protocol=protocol,
        metric=rows[0]["metric"],
        labels=rows[0]["labels"],
        values=[row["values"][0] for row in rows],
        figures=figures,
        examples=str((runs[0] / EXAMPLES).relative_to(out)),
    )
