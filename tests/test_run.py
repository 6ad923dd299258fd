"""moce run: the whole pipeline in one command, each piece once, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from builders import PRETRAIN, RUNTIME, TRAIN
from commands import one_line, run_command, snapshot

import moce
from moce.commands import probe, train
from moce.errors import MoceError

SMALL = {
    **RUNTIME,
    "epochs": 1,
    "model": PRETRAIN["model"],
    "pretrain": {k: v for k, v in PRETRAIN.items() if k != "model" and k not in RUNTIME},
    "cluster": {"num_clusters": 4},
    "train": {k: v for k, v in TRAIN.items() if k not in RUNTIME} | {"epochs": 1},
}


@pytest.fixture
def tasks(runs, tmp_path: Path) -> tuple[str, str]:
    """A labeled task and, of other name, the unlabeled images of the pool."""
    (tmp_path / "birds").symlink_to(runs.task)
    (tmp_path / "plain").mkdir()
    for path in sorted(runs.data.rglob("*.png"))[:6]:
        (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    return f"{tmp_path / 'birds'}/", str(tmp_path / "plain")


def test_every_task_gets_a_backbone_and_labeled_ones_a_score(runs, tasks, tmp_path: Path) -> None:
    out = tmp_path / "x"
    result = moce.run(runs.data, out=out, tasks=tasks, **SMALL)
    assert {path.name for path in out.iterdir()} >= {"mae", "clusters", "moce", "backbones"}
    birds, plain = result.tasks
    assert (birds.task, plain.task) == ("birds", "plain")
    assert (birds.backbone / "model.safetensors").is_file() and plain.mae is None
    again = moce.probe(birds.backbone, runs.task, solver="lbfgs", **RUNTIME)
    assert birds.customized == again.mean
    stored = json.loads((out / "results.json").read_text())["tasks"]
    assert stored[0]["customized"] == birds.customized and stored[1]["customized"] is None
    assert "no labels: not probed" in result.summary()


def test_an_interrupted_run_ends_as_one_that_was_not(
    runs, tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = moce.run(runs.data, out=tmp_path / "straight", tasks=tasks[:1], **SMALL)

    def stop(*_: object) -> None:
        raise MoceError("stopped")

    for module in (train, probe):
        with monkeypatch.context() as patch:
            patch.setattr(module, "run", stop)
            with pytest.raises(MoceError, match="stopped"):
                moce.run(
                    runs.data, out=tmp_path / "y", tasks=tasks[:1], resume=module is probe, **SMALL
                )
    before = snapshot(tmp_path / "y" / "moce")
    resumed = moce.run(runs.data, out=tmp_path / "y", tasks=tasks, resume=True, **SMALL)
    assert snapshot(tmp_path / "y" / "moce") == before, "a finished piece is not repeated"
    assert resumed.tasks[0].customized == straight.tasks[0].customized
    assert resumed.tasks[0].mae == straight.tasks[0].mae
    weights = [
        (tmp_path / name / "moce" / "model.safetensors").read_bytes() for name in ("straight", "y")
    ]
    assert weights[0] == weights[1]


def test_it_can_start_from_an_mae(runs, tasks, tmp_path: Path) -> None:
    given = {k: v for k, v in SMALL.items() if k not in ("epochs", "model", "pretrain")}
    moce.run(runs.data, out=tmp_path / "z", mae=runs.mae, tasks=tasks[:1], **given)
    assert not (tmp_path / "z" / "mae").exists()
    config = yaml.safe_load((tmp_path / "z" / "moce" / "config.yaml").read_text())
    assert config["mae"] == str(runs.mae)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "nowhere/"], "no such images: nowhere/"),
        (["--tasks", "demo:digits,digits"], "two tasks are named digits"),
        (["--cluster", "{num_cluster: 8}"], "did you mean 'num_clusters'"),
        (["--probe", "{solver: x}", "--tasks", "demo:digits"], "setting 'solver'"),
        (["--mae", "nothing"], "nothing"),
        (["--epochs", "3", "--mae", "MAE"], "--epochs"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    flags: list[str], message: str, runs, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(runs.task)
    flags = [str(runs.mae) if word == "MAE" else word for word in flags]
    assert run_command(["run", runs.data, "--out", tmp_path / "out", *flags]) == 2
    assert message in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
