"""The training loop: schedule, optimizer groups, resuming bit for bit, refusals, logs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from builders import DENSE, PRETRAIN, RUNTIME, TRAIN, copy_run

import moce
from moce.errors import Interrupted, MoceError
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics, read_timings
from moce.training.optimizer import adamw, learning_rate, parameter_groups, set_learning_rate

TIMES = {"images_per_s", "step_s", "data_wait_s"}

# --- schedule and optimizer -----------------------------------------------------------------------


def rates(total: int, warmup: float, final: float = 0.0) -> list[float]:
    return [learning_rate(step, total, 2.0, warmup, final) for step in range(total)]


def test_rate_rises_to_its_peak_and_falls_to_its_end() -> None:
    rate = rates(1000, 0.1, 0.5)
    assert 0 < rate[0] < 0.03
    assert max(rate) == pytest.approx(2.0, abs=1e-3)
    assert rate.index(max(rate)) == 100
    assert all(a < b for a, b in pairwise(rate[:101]))
    assert all(a > b for a, b in pairwise(rate[100:]))
    assert rate[-1] == pytest.approx(0.5, abs=1e-3)
    assert rate[550] == pytest.approx(0.5 + 1.5 / 2, abs=1e-3)  # half way down the cosine


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_rate_is_sound_for_very_short_runs(warmup: float, total: int) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(total, warmup))
    assert rates(total, 0.0)[0] == 2.0


def test_matrices_decay_and_vectors_do_not() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    layer[0].bias.requires_grad_(False)
    groups = parameter_groups(layer.parameters(), 0.1, lr_scale=0.5)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (2, 0.0)]
    optimizer = adamw(groups, 0.9)
    set_learning_rate(optimizer, 4.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


def test_rate_is_per_256_images(runs, tmp_path: Path) -> None:
    settings = {**PRETRAIN, "batch_size": 64, "base_lr": 1e-3, "epochs": 1}
    moce.pretrain(runs.data, out=tmp_path / "run", warmup=0, **settings)
    assert read_metrics(tmp_path / "run")[0]["lr"] == pytest.approx(1e-3 * 64 / 256)


def test_number_of_steps_is_epochs_of_images_over_batches(runs, tmp_path: Path) -> None:
    moce.pretrain(runs.data, out=tmp_path / "run", **{**PRETRAIN, "epochs": 0.5})
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]  # 80 images in batches of 32
    assert rows[-1]["epoch"] == pytest.approx(96 / 160)


def test_training_lowers_the_loss(runs) -> None:
    for run in (runs.mae, runs.moce):
        rows = read_metrics(run)
        key = "reconstruction" if "reconstruction" in rows[0] else "loss"
        assert rows[-1][key] < rows[0][key]


# --- resuming -------------------------------------------------------------------------------------


def stop_after(out: Path, steps: int) -> threading.Thread:
    """A thread that sends this process SIGINT as soon as the run has logged so many steps."""

    def watch() -> None:
        metrics = out / "metrics.jsonl"
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def run_command(command: str, runs, out: Path, **changes: object) -> None:
    length = {} if "steps" in changes else {"epochs": 8 if command == "finetune" else 4}
    changes = length | changes
    if command == "pretrain":
        moce.pretrain(runs.data, out=out, **{**PRETRAIN, **changes})
    elif command == "finetune":
        settings = {**RUNTIME, "batch_size": 8, "log_every": 1, "drop_path": 0.5}
        settings |= {} if "lr_grid" in changes else {"base_lr": 1e-2}
        moce.finetune(runs.backbone, runs.task, out=out, **{**settings, **changes})
    else:
        settings = {
            **(DENSE if command in ("mae", "subset") else TRAIN),
            "mae": runs.mae,
        }
        settings |= {} if command in ("mae", "token_moe") else {"clusters": runs.clusters}
        settings |= changes
        moce.train(runs.data, out=out, method=command, **settings)


def same_losses(one: Path, other: Path) -> None:
    """Every number of every row is the same, to the byte; the times are elsewhere."""
    texts = [(run / "metrics.jsonl").read_text() for run in (one, other)]
    assert texts[0] == texts[1] and texts[0].count("\n") > 1
    steps = [[row["step"] for row in read(one)] for read in (read_metrics, read_timings)]
    assert steps[0] == steps[1]


def same_weights(one: Path, other: Path) -> None:
    weights = [read_tensors(run / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_micro_batches_resume_alike(runs, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_command("moce", runs, straight, micro_batch_size=10)
    stop_after(stopped, 2)
    with pytest.raises(Interrupted):
        run_command("moce", runs, stopped, micro_batch_size=10)
    run_command("moce", runs, stopped, micro_batch_size=10, resume=True)
    same_weights(straight, stopped)


def test_killed_run_goes_on_from_its_last_checkpoint(runs, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_command("moce", runs, straight, save_every=4)
    copy_run(straight, killed)
    (killed / "state" / "step_000000020.safetensors").unlink()  # as if it had died after step 18
    (killed / "model.json").unlink()
    metrics = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(metrics[:18]) + '\n{"step": 19, "lo')
    run_command("moce", runs, killed, save_every=4, resume=True)
    same_weights(straight, killed)
    same_losses(straight, killed)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(runs, tmp_path: Path) -> None:
    """The real command, in a process of its own."""
    recipe = {**PRETRAIN, "epochs": 2000, "out": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "moce", "pretrain", str(runs.data), "--config",
               str(tmp_path / "recipe.yaml")]  # fmt: skip
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and len(read_metrics(tmp_path / "run")) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in error and "Traceback" not in error
    done = read_metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "state" / f"step_{done:09d}.safetensors").is_file()


def test_changed_settings_are_refused_showing_the_difference(runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_after(out, 2)
    with pytest.raises(Interrupted):
        run_command("pretrain", runs, out)
    before = (out / "config.yaml").read_text()
    with pytest.raises(MoceError) as refusal:
        run_command("pretrain", runs, out, resume=True, mask_ratio=0.5, batch_size=16)
    for words in ("mask_ratio was 0.75, is 0.5", "batch_size was 32, is 16"):
        assert words in str(refusal.value)
    assert (out / "config.yaml").read_text() == before
    run_command("pretrain", runs, out, resume=True, log_every=7, save_every=3)  # free to change


def test_resuming_a_finished_run_changes_nothing(runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_command("moce", runs, out)
    before, rows = (out / "model.safetensors").read_bytes(), read_metrics(out)
    run_command("moce", runs, out, resume=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert read_metrics(out) == rows


def test_the_two_newest_checkpoints_stay(runs, tmp_path: Path) -> None:
    run_command("pretrain", runs, tmp_path / "run", save_every=3)
    names = sorted(path.name for path in (tmp_path / "run" / "state").glob("step_*"))
    assert names == ["step_000000018.safetensors", "step_000000020.safetensors"]


def flip_a_byte(file: Path) -> None:
    """In the tensors, so that the file still reads."""
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x40
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], runs, tmp_path: Path, capsys
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_command("pretrain", runs, whole, save_every=3)
    stop_after(out, 7)
    with pytest.raises(Interrupted):
        run_command("pretrain", runs, out, save_every=3)
    damage(sorted((out / "state").iterdir())[-1])
    run_command("pretrain", runs, out, save_every=3, resume=True)
    messages = capsys.readouterr().err
    assert "loading the previous checkpoint" in messages and "after step 6" in messages
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_only_damaged_checkpoints_are_a_plain_error(runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_after(out, 2)
    with pytest.raises(Interrupted):
        run_command("pretrain", runs, out)
    next((out / "state").glob("step_*")).write_bytes(b"junk")
    with pytest.raises(MoceError, match="corrupt; start again with --overwrite"):
        run_command("pretrain", runs, out, resume=True)


def test_a_folder_another_process_writes_to_is_refused(runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    code = (
        "import sys; from pathlib import Path; from moce.runs.lock import lock_folder; "
        "lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(MoceError, match="another process is writing"):
            run_command("pretrain", runs, out)
        holder.communicate()
    run_command("pretrain", runs, out)  # free again
    run_command("pretrain", runs, out, resume=True)


# --- losses that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("base_lr", [1e6, 1e9])
def test_a_loss_that_is_not_finite_stops_the_run_without_saving_it(
    base_lr: float, runs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(MoceError, match="not finite"):
        run_command("pretrain", runs, out, base_lr=base_lr, save_every=1, warmup=0)
    for path in (out / "state").glob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in read_tensors(path).values()), path.name
    assert not (out / "model.json").exists()


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(runs, tmp_path: Path) -> None:
    """It says to lower the rate or lengthen the warm-up and to resume."""
    out = tmp_path / "run"
    with pytest.raises(MoceError) as refusal:
        run_command("pretrain", runs, out, base_lr=1e9, warmup=0, save_every=1)
    assert "--base-lr" in str(refusal.value)
    if "--resume" in str(refusal.value):
        run_command("pretrain", runs, out, base_lr=1e-3, warmup=0.1, save_every=1, resume=True)


# --- logs -----------------------------------------------------------------------------------------


def test_metrics_name_losses_rate_and_times(runs) -> None:
    common = {"step", "epoch", "loss", "lr"}
    assert all(row.keys() == common for row in read_metrics(runs.mae))
    for row in read_metrics(runs.moce):
        assert row.keys() == common | {"reconstruction", "balance", "imbalance", "gates"}
        assert row["gates"].keys() == {"1", "3"}
        for gate in row["gates"].values():
            assert gate.keys() == {
                "images_per_expert", "max_gate", "entropy", "clusters_flipped", "clusters_moved",
                "divergence", "purity_by_domain", "purity_by_class",
            }  # fmt: skip
            assert 1 / 4 <= gate["purity_by_domain"] == gate["purity_by_class"] <= 1
            assert sum(gate["images_per_expert"]) == 160
            assert 1 / 3 <= gate["max_gate"] <= 1 and 0 <= gate["entropy"] <= math.log(3)
        total = row["reconstruction"] + 0.01 * (row["balance"] + row["imbalance"])
        assert row["loss"] == pytest.approx(total, abs=1e-5)
    for row in read_timings(runs.moce):
        assert row.keys() == {"step", *TIMES}
        assert 0 <= row["data_wait_s"] < row["step_s"]


def test_fresh_experts_do_not_differ_and_trained_ones_do(runs) -> None:
    rows = [row["gates"]["1"]["divergence"] for row in read_metrics(runs.moce)]
    assert 0 < rows[0] < rows[-1]


def test_a_row_is_the_mean_since_the_last_one(runs, tmp_path: Path) -> None:
    run_command("pretrain", runs, tmp_path / "each")
    run_command("pretrain", runs, tmp_path / "tens", log_every=10)
    each = [row["loss"] for row in read_metrics(tmp_path / "each")]
    tens = [row["loss"] for row in read_metrics(tmp_path / "tens")]
    assert tens == pytest.approx([sum(each[:10]) / 10, sum(each[10:]) / 10], abs=1e-5)


def test_metrics_are_json_that_any_reader_takes(runs, tmp_path: Path) -> None:
    """NaN and Infinity are no JSON: pages and jq cannot read them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")

    with pytest.raises(MoceError):
        run_command("pretrain", runs, tmp_path / "run", base_lr=1e9, warmup=0)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


# --- repeatability --------------------------------------------------------------------------------


def test_same_seed_same_weights_other_seed_other_weights(runs, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_command("pretrain", runs, tmp_path / name, seed=seed, epochs=0.4)
    same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "a", tmp_path / "c")


def test_bf16_training_runs_and_keeps_float32_weights(runs, tmp_path: Path) -> None:
    run_command("moce", runs, tmp_path / "run", precision="bf16", epochs=1)
    weights = read_tensors(tmp_path / "run" / "model.safetensors")
    assert {v.dtype for k, v in weights.items() if k.startswith("model.")} == {torch.float32}
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))


def test_the_whole_gradient_of_a_step_is_clipped(runs, tmp_path: Path, monkeypatch) -> None:
    """Once a step, whatever the micro-batches."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def noted(parameters, **options):
        listed = list(parameters)
        norms.append(float(clip(listed, **options)))
        left = torch.stack([p.grad.norm() for p in listed if p.grad is not None]).norm()
        assert left <= 0.05001
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    for size in (None, 12):
        update = {"steps": 2, "micro_batch_size": size, "clip_grad": 0.05}
        moce.pretrain(runs.data, out=tmp_path / str(size), **{**PRETRAIN, **update})
    assert len(norms) == 4 and min(norms) > 0.05
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-3)
