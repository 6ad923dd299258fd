"""Mistakes in settings, names, outputs and kinds of runs: one line that names it, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from builders import TINY_ARGS, copy_run
from commands import Words, World, one_line, run_command, snapshot

from moce.cli import command_line
from moce.commands.registry import COMMANDS

Case = tuple[Callable[[World], Words], str]
SETTINGS: dict[str, Case] = {
    "no such folder": (lambda w: w.pretrain("/no/such/folder"), "no such images: /no/such/folder"),
    "no such demo": (lambda w: w.pretrain("demo:lions"), "demo:pretrain"),
    "no data": (lambda w: ["pretrain", "--out", w.out], "DATA is missing"),
    "empty data": (lambda w: w.pretrain(""), "no images named"),
    "no output": (lambda w: ["pretrain", w.runs.data], "--out is missing"),
    "unknown flag": (lambda w: w.pretrain(None, "--epoch", 3), "did you mean --epochs"),
    "a flag of other programs": (lambda w: w.pretrain(None, "--lr", 1), "did you mean --base-lr"),
    "the rate of an adaptation": (lambda w: w.customize("--lr", 1), "did you mean --adapt-lr"),
    "another word": (lambda w: w.pretrain(None, "--learning-rate", 1), "did you mean --base-lr"),
    "epochs and steps": (
        lambda w: w.pretrain(None, "--steps", 3), "leave out --epochs: --steps replaces it"),
    "epochs beside a headroom's steps": (
        lambda w: w.headroom("--epochs", 3), "leave out --epochs: --steps replaces it"),
    "unknown command": (lambda w: ["pretain", w.runs.data], "did you mean 'pretrain'"),
    "a command like none": (lambda w: ["xyzzy"], "pretrain, cluster, train"),
    "a flag before the command": (lambda w: ["--seed", 3, "doctor"], "expected a command before --seed"),
    "a flag without its value": (lambda w: w.pretrain(None, "--steps"), "--steps"),
    "several mistakes": (
        lambda w: w.pretrain(None, "--epochs", "many", "--mask-ratio", 2, "--batch-size", 0),
        "setting 'epochs': input should be a valid number",
    ),
    "words for numbers": (lambda w: w.pretrain(None, "--epochs", "many"), "'epochs'"),
    "zero batch": (lambda w: w.pretrain(None, "--batch-size", 0), "batch_size"),
    "huge batch": (lambda w: w.pretrain(None, "--batch-size", "9" * 20), "batch_size"),
    "negative epochs": (lambda w: w.pretrain(None, "--epochs", -1), "epochs"),
    "infinite rate": (lambda w: w.pretrain(None, "--base-lr", "inf"), "base_lr"),
    "a rate beyond all floats": (lambda w: w.probe("--base-lr", "1e300"), "base_lr"),
    "epochs beyond all floats": (lambda w: w.probe("--epochs", "1e308"), "epochs"),
    "an entropy weight of next to nothing": (
        lambda w: w.cluster("--epsilon", "1e-45"), "epsilon"),
    "zero image size": (lambda w: w.pretrain(None, "--img-size", 0), "img_size"),
    "image size between patches": (
        lambda w: w.pretrain(None, "--img-size", 30), "image size 30x30 is no multiple of the patch"),
    "thousands of threads": (lambda w: w.pretrain(None, "--threads", 10**8), "threads"),
    "a seed that is too large": (lambda w: w.pretrain(None, "--seed", 2**63), "seed"),
    "no deviation": (lambda w: w.pretrain(None, "--std", "0,0,0"), "std"),
    "too few means": (lambda w: w.pretrain(None, "--mean", "0.1,0.2"), "--mean has 2 values"),
    "unknown model": (
        lambda w: w.pretrain(None, "--model", "vit_tiny_patch16_22"), "vit_tiny_patch16_224"),
    "half a name": (
        lambda w: w.pretrain(None, "--model", "vit_base"), "did you mean 'vit_base_patch16_224'"),
    "a name of papers": (
        lambda w: w.pretrain(None, "--model", "ViT-L/16"), "did you mean 'vit_large_patch16_224'"),
    "half a name of weights": (
        lambda w: w.cluster(mae="vit_base"), "did you mean 'vit_base_patch16_224'"),
    "half a name of a backbone": (
        lambda w: w.embed(backbone="vit_small"), "did you mean 'vit_small_patch16_224'"),
    "unknown weights of a model": (
        lambda w: w.embed(backbone="vit_base_patch16_224.maee"), "no weights 'maee' of vit_base"),
    "unsuitable model": (
        lambda w: w.pretrain(None, "--model", "resnet18", "--model-args", "{}"), "resnet18"),
    "model with a head": (
        lambda w: w.pretrain(None, "--model-args", "{num_classes: 10}"), "num_classes"),
    "model without blocks": (
        lambda w: w.pretrain(None, "--model-args", "{depth: 0}"), "at least one block"),
    "model that drops more than all": (
        lambda w: w.pretrain(None, "--model-args", "{drop_path_rate: 5}"), "drop_path_rate"),
    "model without patches": (
        lambda w: w.pretrain(None, "--model-args", "{patch_size: 0}"), "timm cannot build"),
    "wrong model arguments": (
        lambda w: w.pretrain(None, "--model-args", "{color: red}"), "color"),
    "model arguments no mapping": (
        lambda w: w.pretrain(None, "--model-args", "depth"), "model_args"),
    "model arguments no YAML": (lambda w: w.pretrain(None, "--model-args", "{a: ["), "model-args"),
    "negative heads": (
        lambda w: w.pretrain(None, "--model-args", "{patch_size: 4, embed_dim: 32, num_heads: -2}"), ""),
    "channels that are words": (
        lambda w: w.pretrain(None, "--model-args", "{in_chans: x}"), "in_chans must be a number, not 'x'"),
    "three sides": (
        lambda w: w.pretrain(None, "--model-args", "{img_size: [8, 8, 8]}"), "[height, width]"),
    "a side that is a word": (
        lambda w: w.cluster("--model-args", "{patch_size: x}", mae=_weights(w)), "patch_size must be one"),
    "a path with a zero byte": (lambda w: [*w.pretrain(), "--out", "a\0b"], "zero byte"),
    "decoder of odd width": (lambda w: w.pretrain(None, "--decoder-dim", 30), "30"),
    "decoder heads": (lambda w: w.pretrain(None, "--decoder-heads", 3), "heads"),
    "more clusters than images": (lambda w: w.cluster("--num-clusters", 500), "500"),
    "zero clusters": (lambda w: w.cluster("--num-clusters", 0), "num_clusters"),
    "more experts than clusters": (lambda w: w.train("--num-experts", 9), "9 experts"),
    "no clusters": (
        lambda w: ["train", w.runs.data, "--mae", w.runs.mae, "--out", w.out], "--clusters"),
    "no such block": (lambda w: w.train("--moe-blocks", "1,7"), "moe_blocks"),
    "blocks that are no numbers": (lambda w: w.train("--moe-blocks", "one"), "moe_blocks"),
    "a block twice": (lambda w: w.train("--moe-blocks", "1,1"), "moe_blocks"),
    "unknown pooling": (lambda w: w.cluster("--pooling", "max"), "pooling"),
    "unknown strategy": (lambda w: w.customize("--strategy", "best"), "strategy"),
    "unknown format": (lambda w: w.export("--format", "keras"), "'timm', 'transformers'"),
    "size of a pack": (lambda w: w.pack("--size", "16x"), "size"),
    "no size of a pack": (lambda w: ["pack", w.runs.data, "--out", w.file("a.moce")], "--size"),
    "one label": (lambda w: w.probe("--num-labels", 1), "num_labels 1"),
    "allow all weights to be missing": (
        lambda w: w.cluster("--allow-missing", "*", mae=_weights(w)), "would let every weight start fresh"),
    # Settings that would be ignored.
    "experts of an MAE": (
        lambda w: w.train("--method", "mae"),
        "leave out --clusters and --num-experts: method mae does not use them"),
    "experts of a subset": (
        lambda w: w.train("--method", "subset", "--task", w.runs.task, "--moe-blocks", 1),
        "leave out --moe-blocks and --num-experts"),
    "clusters of tokens": (
        lambda w: w.train("--method", "token_moe", "--no-gate-noise"),
        "leave out --clusters and --no-gate-noise"),
    "blocks of tokens": (
        lambda w: ["train", w.runs.data, "--mae", w.runs.mae, "--out", w.out, "--method", "token_moe",
                   "--expert-scope", "block", "--shared-gate"],
        "leave out --expert-scope and --shared-gate"),
    "losses of fixed gates": (
        lambda w: w.train("--method", "sdr", "--balance-weight", 0.1), "leave out --balance-weight"),
    "a task of experts": (
        lambda w: w.train("--task", w.runs.task, "--task-share", 0.5), "--task and --task-share"),
    "confidence of random gates": (
        lambda w: w.train("--gate-init", "random", "--gate-confidence", 0.9), "--gate-confidence"),
    "deviation of gates from centroids": (
        lambda w: w.train("--gate-init-std", 0.1), "leave out --gate-init-std"),
    "pickle of a run": (
        lambda w: w.convert("--trust-pickle"), "read without pickle"),
    "pickle of safetensors": (
        lambda w: w.convert("--trust-pickle", weights=_weights(w).rename(w.folder / "b.safetensors")),
        "leave out --trust-pickle"),
    "a rate beside a grid of them": (
        lambda w: w.finetune("--base-lr", 1e-2, "--lr-grid", "1e-3,1e-2"),
        "leave out --base-lr: --lr-grid replaces it"),
    "a share of validation without a grid": (
        lambda w: w.finetune("--val-share", 0.1),
        "only --lr-grid and --keep-best use it: leave out --val-share"),
    "epochs of headroom": (lambda w: w.headroom("--epochs", 3), "--steps"),
    "assignment of a probe": (
        lambda w: w.customize("--strategy", "probe", "--assign", "nearest"), "--assign"),
    "threshold of a probe": (
        lambda w: w.customize("--strategy", "probe", "--threshold", 0.8), "--threshold"),
    "threshold of a route": (
        lambda w: w.customize("--strategy", "route", "--threshold", 0.8), "--threshold"),
    "solver of neighbors": (lambda w: w.probe("--kind", "knn", "--solver", "lbfgs"), "--solver"),
    "neighbors of a linear probe": (lambda w: w.probe("--neighbors", 3), "--neighbors"),
    "rate without steps": (lambda w: w.probe("--solver", "lbfgs", "--base-lr", 1), "--base-lr"),
    "strategy of an MAE": (lambda w: w.export("--strategy", "generalist"), "--strategy"),
    "weights' model of a run": (
        lambda w: w.cluster("--model", "vit_tiny_patch16_224"), "model comes from the run"),
    "weights' heads of a run": (
        lambda w: w.export("--decoder-heads", 3), "decoder_heads comes from the run"),
    "size without a pack": (
        lambda w: ["pack", w.runs.data, "--size", 16], "--out"),
}  # fmt: skip


def _weights(w: World) -> Path:
    """The weights of an MAE as a file of moce's own."""
    assert run_command(["convert", w.runs.mae, "--out", w.folder / "mae.safetensors"]) == 0
    return w.folder / "mae.safetensors"


def _unfinished(w: World) -> Path:
    run = copy_run(w.runs.mae, w.folder / "unfinished")
    (run / "model.json").unlink()
    return run


KINDS: dict[str, Case] = {
    "export a classifier of routed tokens": (
        lambda w: w.export(run=w.edited("mae", "model.json", kind="classifier")), "token-routed"),
    "cluster by a classifier": (
        lambda w: w.cluster(mae=w.edited("mae", "model.json", kind="classifier")), "'classifier'"),
    "customize a mixture by tokens": (
        lambda w: w.customize(run=w.edited("mae", "model.json", kind="token_moe")), "'token_moe'"),
    "export a mixture by tokens": (
        lambda w: w.export(run=w.edited("mae", "model.json", kind="token_moe")), "no dense ViT is equivalent"),
    "an unfinished run": (
        lambda w: w.cluster(mae=_unfinished(w)), "is not finished"),
    "export an unfinished run": (lambda w: w.export(run=_unfinished(w)), "is not finished"),
    "cluster by clusters": (lambda w: w.cluster(mae=w.runs.clusters), "give one of moce pretrain"),
    "cluster by a mixture": (lambda w: w.cluster(mae=w.runs.moce), "a run of moce train"),
    "cluster by images": (lambda w: w.cluster(mae=w.runs.data), "not a moce run"),
    "cluster by nothing": (lambda w: w.cluster(mae="/no/run"), "not a moce run"),
    "pretrain from clusters": (
        lambda w: ["pretrain", w.runs.data, "--init", w.runs.clusters, "--out", w.out], "'clusters'"),
    "train on an MAE's clusters": (lambda w: w.train(clusters=w.runs.mae), "give one of moce cluster"),
    "train on a backbone's clusters": (lambda w: w.train(clusters=w.runs.backbone), "not a moce run"),
    "train from a mixture": (lambda w: w.train(mae=w.runs.moce), "kind 'moce'"),
    "headroom of a mixture": (lambda w: w.headroom(mae=w.runs.moce), "kind 'moce'"),
    "headroom without clusters": (lambda w: w.headroom(clusters=w.runs.mae), "kind 'mae'"),
    "customize an MAE": (
        lambda w: w.customize(run=w.runs.mae), "moce train gives it experts; give one of moce train"),
    "customize clusters": (lambda w: w.customize(run=w.runs.clusters), "take as --clusters"),
    "customize a backbone": (lambda w: w.customize(run=w.runs.backbone), "a backbone, which moce probe"),
    "customize nothing": (lambda w: w.customize(run="/no/run"), "not a moce run"),
    "export clusters": (lambda w: w.export(run=w.runs.clusters), "kind 'clusters'"),
    "export a mixture as it is": (lambda w: w.export(run=w.runs.moce), "--route"),
    "export images": (lambda w: w.export(run=w.runs.data), "holds no weights"),
    "export nothing": (lambda w: w.export(run="/no/run"), "no weights at /no/run"),
    "convert clusters": (lambda w: w.convert(weights=w.runs.clusters), "kind 'clusters'"),
    "convert a mixture": (lambda w: w.convert(weights=w.runs.moce), "moce customize makes a backbone"),
    "convert images": (lambda w: w.convert(weights=w.runs.data), "holds no weights"),
    "probe a mixture": (lambda w: w.probe(backbone=w.runs.moce), "moce customize"),
    "probe clusters": (lambda w: w.probe(backbone=w.runs.clusters), "kind 'clusters'"),
    "probe images": (lambda w: w.probe(backbone=w.runs.data), "not a moce run"),
    "probe nothing": (lambda w: w.probe(backbone="no/where"), "no backbone at no/where"),
    "probe a model like no other": (
        lambda w: w.probe(backbone="vit_tiny_patch16_22"), "did you mean 'vit_tiny_patch16_224'"),
    "probe unlabeled": (
        lambda w: w.probe(data=w.runs.task / "test" / "0" / "0.png"), "no labels"),
    "finetune a mixture": (lambda w: w.finetune(backbone=w.runs.moce), "moce customize"),
    "finetune clusters": (lambda w: w.finetune(backbone=w.runs.clusters), "kind 'clusters'"),
    "evaluate clusters": (
        lambda w: w.evaluate(backbones=f"a={w.runs.clusters}"), "kind 'clusters'"),
    "evaluate nothing": (lambda w: w.evaluate(backbones="a=no/where"), "no backbone at no/where"),
    "report a backbone": (lambda w: w.report(w.runs.backbone), "exported backbone"),
    "report images": (lambda w: w.report(w.runs.data), "is not a moce run and contains none"),
    "report nothing": (lambda w: w.report("/no/run"), "no such folder: /no/run"),
    "train on a file's clusters": (
        lambda w: w.train(clusters=w.file("a", "x")), "is not a moce run"),
    "customize a file": (lambda w: w.customize(run=w.file("a", "x")), "is not a moce run"),
    "report a file": (lambda w: w.report(w.file("a", "x")), "no such folder"),
    "a suite that is a folder": (
        lambda w: w.evaluate(suite=w.folder), "cannot read recipe"),
    "a suite that is gone": (lambda w: w.evaluate(suite="/no/suite.yaml"), "cannot read recipe"),
    "resume nothing": (
        lambda w: ["pretrain", w.runs.data, "--out", w.images("a.png"), "--resume"], "no run to resume"),
    "resume a run of another command": (
        lambda w: [
            *("cluster", w.runs.data, "--mae", w.runs.mae, "--resume"),
            *("--out", copy_run(w.runs.mae, w.folder / "run"))], "resume"),
    "backbones of one name": (
        lambda w: w.evaluate(backbones=f"a={w.runs.mae},a={w.runs.backbone}"), "the same name"),
    "a backbone without a name": (lambda w: w.evaluate(backbones=str(w.runs.mae)), "NAME=PATH"),
    "data named twice": (lambda w: w.pretrain(f"{w.runs.data},{w.runs.data}"), "named 2 times"),
    "protocols of no kind": (lambda w: w.evaluate("--protocols", "linear,svm"), "protocols"),
}  # fmt: skip
OUTPUTS: dict[str, Case] = {
    "a file": (lambda w: ["pretrain", w.runs.data, "--out", w.file("a", "x")], "is a file"),
    "under a file": (
        lambda w: [*w.pretrain(), "--out", w.file("a", "x") / "run"], "cannot make"),
    "convert under a file": (
        lambda w: [*w.convert(), "--out", w.file("a", "x") / "b.safetensors"], "a"),
    "report under a file": (
        lambda w: ["report", w.runs.mae, "--out", w.file("a", "x") / "r.html"], "cannot make"),
    "report over weights": (
        lambda w: ["report", w.runs.mae, "--out", w.file("a.pt", "x")], "not an HTML page"),
    "pack under a file": (lambda w: [*w.pack(), "--out", w.file("a", "x") / "b.moce"], "a"),
    "customize under a file": (
        lambda w: [*w.customize(), "--out", w.file("a", "x") / "b"], "cannot make"),
    "a name that is too long": (lambda w: [*w.pretrain(), "--out", w.folder / ("x" * 300)], "too long"),
    "convert to a name of no weights": (
        lambda w: ["convert", w.runs.mae, "--out", w.file("a.pth")], ".safetensors"),
    "convert over a file": (
        lambda w: ["convert", w.runs.mae, "--out", w.file("a.safetensors", "x")], "--overwrite"),
    "a folder of a run": (
        lambda w: [*w.pretrain(), "--out", copy_run(w.runs.mae, w.folder / "run")],
        "--overwrite to replace it, or --resume"),
    "a folder of other things": (
        lambda w: [*w.pretrain(), "--out", w.file("a/precious.txt", "mine").parent, "--overwrite"],
        "files that moce did not write"),
    "its own input": (
        lambda w: [*w.pretrain(w.images("a.png")), "--out", w.folder / "images", "--overwrite"],
        "holds the input"),
}  # fmt: skip
RECIPES: dict[str, tuple[str, str]] = {
    "no YAML": ("epochs: [1", "YAML"),
    "a list": ("- a\n- b", "setting: value"),
    "empty": ("", "setting: value"),
    "a number": ("3", "setting: value"),
    "mistyped": ("epoch: 3", "did you mean 'epochs'"),
    "of another type": ("epochs: lots", "epochs"),
    "several mistakes": ("epoch: 3\nbatch_size: none\nmask_ratio: 7\nmodel: 5", "'mask_ratio'"),
    "numbers for names": ("1: 2", "'1'"),
    "a secret object": ("model: !!python/object/apply:os.system [ls]", "YAML"),
    "twice the same": ("epochs: 1\nepochs: 2", "'epochs' is given twice"),
    "a date of no month": ("seed: 2020-99-99", "YAML"),
    "a number that is none": ("seed: !!int x", "YAML"),
    "an answer that is none": ("hflip: !!bool x", "YAML"),
    "a number of thousands of digits": (f"seed: {'9' * 5000}", "YAML"),
    "nested without end": ("[" * 5000, "nested too deeply"),
    "a value that grows": (
        "model_args:\n  a: &a [x, x]\n"
        + "".join(f"  {b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefghijkl"))
        + "seed: *l",
        "'seed'",
    ),
    "nested": ("model_args: [1, 2]", "model_args"),
}
SUITES: dict[str, tuple[dict, str]] = {
    "no tasks": ({"tasks": []}, "tasks"),
    "mistyped": ({"taks": [], "tasks": [{"name": "a", "data": "x"}]}, "did you mean 'tasks'"),
    "mistyped in a task": (
        {"tasks": [{"name": "a", "data": "x", "metrik": "accuracy"}]}, "did you mean 'metric'"),
    "mistyped in a section": ({"probe": {"epoch": 3}}, "did you mean 'epochs'"),
    "no such images": ({"tasks": [{"name": "a", "data": "/no/images"}]}, "no images at /no/images"),
    "a path as name": ({"tasks": [{"name": "../a", "data": "x"}]}, "name"),
}  # fmt: skip


def refuse(case: Case, runs, folder: Path, capsys) -> str:
    """Run a case; its one line. Nothing in the folder has changed after it."""
    world = World(runs, folder)
    words = case[0](world)
    capsys.readouterr()
    before = snapshot(folder)
    assert run_command(words) in (1, 2)
    line = one_line(capsys.readouterr().err)
    assert case[1] in line, line
    assert snapshot(folder) == before
    return line


TABLE = {
    f"{title}: {name}": case
    for title, cases in (("settings", SETTINGS), ("kinds", KINDS), ("output", OUTPUTS))
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_one_line_and_nothing_is_written(name: str, runs, tmp_path, capsys) -> None:
    refuse(TABLE[name], runs, tmp_path, capsys)


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe_is_refused(name: str, runs, tmp_path: Path, capsys) -> None:
    text, expected = RECIPES[name]
    recipe: Case = (
        lambda w: ["pretrain", "x", "--out", w.out, "--config", w.file("r.yaml", text)],
        expected,
    )
    line = refuse(recipe, runs, tmp_path, capsys)
    if name == "several mistakes":
        assert all(f"'{key}'" in line for key in ("epoch", "batch_size", "mask_ratio", "model"))


def test_a_recipe_that_is_not_there_or_a_folder_is_refused(runs, tmp_path: Path, capsys) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        case: Case = (lambda w, path=path: w.pretrain(None, "--config", path), "cannot read recipe")
        refuse(case, runs, tmp_path, capsys)


@pytest.mark.parametrize("name", SUITES)
def test_a_wrong_suite_is_refused(name: str, runs, tmp_path: Path, capsys) -> None:
    changes, expected = SUITES[name]
    refuse((lambda w: w.evaluate(suite=w.suite(**changes)), expected), runs, tmp_path, capsys)


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command not in ("demo", "doctor")]
)
def test_a_command_without_arguments_lists_what_it_needs(
    command: str, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command([command]) == 2
    line = one_line(capsys.readouterr().err)
    needed = [
        n for n, field in COMMANDS[command].settings.model_fields.items() if field.is_required()
    ]
    shown = command_line(COMMANDS[command])
    assert all(f"{shown(name)} is missing" in line for name in needed)
    assert "setting" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["pretain"],
        ["pretrain"],
        pytest.param(["pretrain", "/no/images", "--out", "o"], marks=pytest.mark.slow),  # torch
        ["cluster", "--color"],
    ],
)
def test_a_process_of_its_own_ends_as_the_table_says(words: Words, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moce", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_model_args_of_two_channels_name_them(runs, tmp_path: Path, capsys) -> None:
    args = json.dumps({**TINY_ARGS, "in_chans": 2})
    case: Case = (lambda w: w.pretrain(None, "--model-args", args), "2 channels")
    refuse(case, runs, tmp_path, capsys)


def test_a_closed_stdout_is_no_defect(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after >&-
    assert run_command(["convert", runs.mae, "--out", tmp_path / "a.safetensors"]) == 0
    assert not capsys.readouterr().err
    assert (tmp_path / "a.safetensors").is_file()
