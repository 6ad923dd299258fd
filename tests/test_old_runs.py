"""Runs, recipes and names of moce 0.1.0 are understood."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest
import yaml
from builders import copy_run
from commands import run_command

import moce
from moce import config
from moce.config.load import parse, renamed
from moce.errors import MoceError
from moce.runs.resume import check_unchanged, recorded_settings


def one_line(capsys) -> str:
    """The error of the last command, which must be one line without a traceback."""
    return commands.one_line(capsys.readouterr().err)


OLD_NAMES = {
    "max_iterations": "max_rounds",
    "allow_unexpected": "allow_surplus",
    "cache_on_gpu": "resident",
    "neighbors": "neighbours",
}


def test_old_names_are_known() -> None:
    assert renamed() == {old: new for new, old in OLD_NAMES.items()}


def as_written_by_0_1_0(run: Path) -> Path:
    """The run with a config.yaml of the old form."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    old = {OLD_NAMES.get(name, name): value for name, value in content.items()}
    assert old.keys() != content.keys()
    (run / "config.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    return run


def test_a_run_of_0_1_0_resumes_and_is_a_recipe(runs, tmp_path: Path) -> None:
    run = as_written_by_0_1_0(copy_run(runs.clusters, tmp_path / "run"))
    words = ["cluster", runs.data, "--mae", runs.mae, "--resume"]
    assert run_command([*words, "--out", run]) == 0
    assert run_command([*words, "--out", run, "--max-iterations", 3]) == 2
    run = as_written_by_0_1_0(copy_run(runs.clusters, tmp_path / "recipe"))
    out = tmp_path / "again"
    assert run_command(["cluster", "--config", run / "config.yaml", "--out", out]) == 0
    assert (out / "model.json").is_file()


def test_old_names_elsewhere_say_what_they_are_now(runs, tmp_path: Path, capsys) -> None:
    for command, old, new in (
        ("cluster", "--max-rounds", "--max-iterations"),
        ("pretrain", "--no-resident", "--no-cache-on-gpu"),
        ("probe", "--neighbours=3", "--neighbors"),
    ):
        assert run_command([command, runs.data, old, *([] if "=" in old else ["3"])]) == 2
        assert f"{old.split('=')[0]} is now {new} (see moce {command} --help)" in one_line(capsys)
    with pytest.raises(MoceError, match="setting 'max_rounds' is now 'max_iterations'"):
        moce.cluster("x", mae="m", out="o", max_rounds=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{max_rounds: 3, max_iterations: 4}")
    assert run_command(["cluster", "x", "--config", recipe]) == 2
    assert "give one of them" in one_line(capsys)


NEW_TO_FINETUNE = [
    "task",
    "annotations",
    "ignore_index",
    "image_size",
    "jitter",
    "window",
    "masks",
    "head_args",
    "logger",
    "class_weights",
    "sampling",
    "keep_best",
    "patience",
    "ema",
    "freeze",
    "lora",
    "lora_alpha",
    "lora_targets",
]


def test_a_fine_tuning_of_0_1_0_has_none_of_the_newer_settings(tmp_path: Path) -> None:
    """They stand for what it did: it may be resumed."""
    values = {"backbone": "b", "data": "d", "out": tmp_path, "resume": True}
    settings = parse(config.FinetuneSettings, values)
    content = settings.model_dump(mode="json")
    assert content.keys() > set(NEW_TO_FINETUNE)
    old = {name: value for name, value in content.items() if name not in NEW_TO_FINETUNE}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    resumed = recorded_settings(settings).model_copy(update={"task": "classify"})
    check_unchanged(resumed)
    with pytest.raises(MoceError, match="sampling was 'shuffled', is 'balanced'"):
        check_unchanged(resumed.model_copy(update={"sampling": "balanced"}))
