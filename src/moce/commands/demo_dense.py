"""moce demo --dense: a segmenter of composed images, from an MAE of the embedded ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moce.commands import finetune, predict, pretrain
from moce.config import FinetuneSettings, PredictSettings, PretrainSettings
from moce.dense.composed import write_scenes
from moce.runtime.distributed import run_on_rank0

SCENES, SEGMENTER, FOUND = "demo_scenes", "segmenter", "predictions"
TRAIN, VAL = 400, 100  # images
SIDE = 64  # pixels
# A linear layer on all tokens: what small networks on two cores learn most from in a minute.
SEGMENT: dict[str, Any] = {
    "task": "segment",
    "image_size": SIDE,
    "jitter": (0.8, 1.25),
    "batch_size": 16,
    "base_lr": 6.4e-2,
    "layer_decay": 0.9,
    "drop_path": 0.0,
    "warmup": 0.1,
    "head_args": {"kind": "linear"},
}


def dense_steps(
    out: Path, mae: PretrainSettings, epochs: float, runtime: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    """Pre-train, compose images, fine-tune for `epochs`, and draw what is found in the test images."""
    scenes = out / SCENES
    segment = FinetuneSettings(
        backbone=str(out / "mae"),
        data=str(scenes),
        out=out / SEGMENTER,
        epochs=epochs,
        save_every=1000,
        **SEGMENT,
        **runtime,
    )
    found = PredictSettings(
        model=str(out / SEGMENTER),
        data=str(scenes / "images" / "val"),
        out=out / FOUND,
        **runtime,
    )
    return {
        "mae": partial(pretrain.run, mae),
        "images": partial(run_on_rank0, partial(write_scenes, scenes, "kinds", TRAIN, VAL, SIDE)),
        "segmenter": partial(finetune.run, segment),
        "predictions": partial(predict.run, found),
    }
