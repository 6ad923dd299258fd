"""Fine-tuning that validates itself: best weights, early stopping, averages, frozen blocks, weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import RUNTIME

import moce
from moce.errors import Interrupted, MoceError
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics
from moce.training.trainer import Objective

SETTINGS = {**RUNTIME, "batch_size": 8, "base_lr": 1e-2, "epochs": 6, "mixup": 0, "cutmix": 0}


def finetune(runs, out: Path, **changes: object):
    return moce.finetune(runs.backbone, runs.task, out=out, **{**SETTINGS, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "model.safetensors")


def row_of(run: Path) -> dict:
    return json.loads((run / "rows.jsonl").read_text())


def test_the_best_weights_on_held_out_images_are_kept(runs, tmp_path: Path) -> None:
    """The same run stopped at its best score ends with the same weights."""
    finetune(runs, tmp_path / "run", keep_best=True)
    values = [row["val"] for row in read_metrics(tmp_path / "run")]
    assert len(values) == 5  # once an epoch
    assert row_of(tmp_path / "run")["val"] == max(values)
    finetune(runs, tmp_path / "stopped", keep_best=True, patience=1, epochs=6)
    stopped = [row["val"] for row in read_metrics(tmp_path / "stopped")]
    falls = [n for n in range(1, 5) if values[n] <= max(values[:n])]
    assert stopped == values[: (falls[0] + 1 if falls else 5)]


def test_a_resumed_validation_goes_on_as_if_it_had_not_stopped(
    runs, tmp_path: Path, monkeypatch
) -> None:
    asked = {"keep_best": True, "ema": 0.8, "save_every": 1}
    finetune(runs, tmp_path / "whole", **asked)
    step = Objective.converged
    calls = []

    def stop(self: Objective) -> bool:
        calls.append(self)
        if len(calls) == 3:
            raise Interrupted(2, tmp_path, "here")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr("moce.evaluation.finetune.FinetuneObjective.converged", stop)
        with pytest.raises(Interrupted):
            finetune(runs, tmp_path / "cut", **asked)
    finetune(runs, tmp_path / "cut", **asked, resume=True)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_average_of_one_step_is_the_last_weights(runs, tmp_path: Path) -> None:
    """Decay 0 is none; a decay near 0 ends near the last weights, near 1 at the first step's."""
    for name, decay in (("none", 0.0), ("short", 1e-6), ("long", 0.999999)):
        finetune(runs, tmp_path / name, ema=decay, drop_path=0)
    last, short, long = (
        weights(tmp_path / name)["head.weight"] for name in ("none", "short", "long")
    )
    assert torch.allclose(last, short, atol=1e-6)
    assert not torch.allclose(last, long, atol=1e-3)


@pytest.mark.parametrize("freeze", [1, "backbone"])
def test_frozen_parts_keep_their_weights(runs, tmp_path: Path, freeze: object) -> None:
    """Of the backbone's, only later blocks move; weight decay does not reach the others either."""
    finetune(runs, tmp_path / "run", freeze=freeze, epochs=1)
    before, after = weights(runs.backbone), weights(tmp_path / "run")
    shared = before.keys() & after.keys()
    moved = {name for name in shared if not torch.equal(after[name], before[name])}
    later = {n for n in shared if n.startswith("blocks.") and not n.startswith("blocks.0.")}
    assert moved == (later if freeze == 1 else set())


def test_more_frozen_blocks_than_there_are_is_refused(runs, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="--freeze 99: the backbone has"):
        finetune(runs, tmp_path / "run", freeze=99)
    assert not (tmp_path / "run").exists()


def test_balanced_weights_are_inverse_to_the_images_of_a_class() -> None:
    from moce.config import FinetuneSettings
    from moce.evaluation.finetune import _criterion

    settings = FinetuneSettings(backbone="b", data="d", out="o", class_weights="balanced")
    labels = np.array([0] * 6 + [1] * 2)
    criterion = _criterion(labels, 2, settings)
    assert criterion.weight.tolist() == pytest.approx([8 / 12, 8 / 4])


def test_balanced_sampling_draws_other_images(runs, tmp_path: Path) -> None:
    """The order itself is tested with the other orders; here, that training takes it, and resumes."""
    task = Path(shutil.copytree(runs.task, tmp_path / "task"))
    rare = sorted((task / "train").iterdir())[0]
    for path in sorted(rare.iterdir())[3:]:
        path.unlink()
    found = {}
    for name in ("shuffled", "balanced"):
        moce.finetune(runs.backbone, task, out=tmp_path / name, sampling=name, **SETTINGS)
        found[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert len(found["shuffled"]) == len(found["balanced"])
    assert found["shuffled"] != found["balanced"]


def test_patience_and_val_share_need_something_to_hold_out_for(runs, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="--keep-best uses"):
        finetune(runs, tmp_path / "run", patience=2)
    with pytest.raises(MoceError, match="--lr-grid and --keep-best"):
        finetune(runs, tmp_path / "run", val_share=0.3)
    assert not (tmp_path / "run").exists()
