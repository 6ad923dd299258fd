"""Runs also log to TensorBoard, Weights & Biases and MLflow: the real packages, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import PRETRAIN

import moce
from moce.errors import MoceError


def pretrain(runs, out: Path, **changes: object) -> None:
    moce.pretrain(runs.data, out=out, **{**PRETRAIN, "epochs": 0.4, "log_every": 1, **changes})


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["step"]]


def test_tensorboard_has_every_row(runs, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, asked in (("flag", {"tensorboard": True}), ("name", {"logger": ("tensorboard",)})):
        pretrain(runs, tmp_path / name, **asked)
        events = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        values = [event.value for event in events.Scalars("loss")]
        assert values == pytest.approx(losses(tmp_path / name))


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(runs, tmp_path: Path, monkeypatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    pretrain(runs, run, logger=("mlflow",), save_every=1)
    state = sorted((run / "state").glob("step_*"))
    (run / "model.json").unlink()  # as if it had been stopped before the last step
    state[-1].unlink()
    pretrain(runs, run, logger=("mlflow",), save_every=1, resume=True)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'moce'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["loss"] == pytest.approx(losses(run)[-1])
    assert found.data.params["mask_ratio"] == "0.75"


@pytest.mark.slow
def test_wandb_writes_an_offline_run(runs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    pretrain(runs, tmp_path / "run", logger=("wandb",), monitor=(str(runs.task),))
    assert list((tmp_path / "run" / "wandb").rglob("media/images/reconstructions_*.png"))
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()  # rows are JSON texts; one may be cut in two by the end of a block
    assert any(json.dumps(loss).encode() in content for loss in losses(tmp_path / "run"))
    # The folder is still known as a run.
    pretrain(runs, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_missing_package_is_named_before_anything_is_written(
    runs, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("moce.training.loggers.find_spec", lambda name: None)
    with pytest.raises(MoceError, match=r"pip install 'moce\[wandb\]'"):
        pretrain(runs, tmp_path / "run", logger=("wandb",))
    assert not (tmp_path / "run").exists()
