"""Resuming: what a run keeps and leaves, changed inputs, and faults. Real kills are in test_kill.py."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import PRETRAIN, RUNTIME, TRAIN, copy_run, write_images
from conftest import Runs
from test_training import run_command, same_losses, same_weights, stop_after

import moce
import moce.runs.files
import moce.training.checkpoint as checkpoint
from moce.cli import main
from moce.config import PretrainSettings
from moce.data.load import load_images
from moce.errors import Interrupted, MoceError, NotFinite, Terminated
from moce.runs.model import read_config, read_metrics, read_timings
from moce.runtime.device import prepare
from moce.training.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint
from moce.training.metrics import Window
from moce.training.optimizer import AdamW

QUICK = {**PRETRAIN, "steps": 6, "save_every": 3}


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain", "mae", "moce", "sdr", "token_moe", "finetune"])
def test_sums_between_rows_survive_a_stop(command: str, runs: Runs, tmp_path: Path) -> None:
    """Stopped between rows, with a checkpoint that falls on none of them."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    given = {"log_every": 3, "save_every": 4, "steps": 14}
    run_command(command, runs, straight, **given)
    watcher = stop_after(stopped, 1)
    with pytest.raises(Interrupted) as stop:
        run_command(command, runs, stopped, **given)
    watcher.join()
    assert stop.value.exit_status == 130
    assert not (stopped / "model.json").exists()
    assert all(row["step"] % 3 == 0 for row in read_metrics(stopped))
    run_command(command, runs, stopped, resume=True, **given)
    same_losses(straight, stopped)
    same_weights(straight, stopped)


@pytest.mark.slow
def test_a_subset_and_a_rate_chosen_from_a_grid_resume_alike(runs: Runs, tmp_path: Path) -> None:
    for command, more in (("subset", {"task": runs.task}), ("finetune", {"lr_grid": (0.01, 0.1)})):
        straight, stopped = tmp_path / f"{command}_straight", tmp_path / f"{command}_stopped"
        given = {"log_every": 3, "steps": 12, **more}
        run_command(command, runs, straight, **given)
        stop_after(stopped, 1)
        with pytest.raises(Interrupted):
            run_command(command, runs, stopped, **given)
        run_command(command, runs, stopped, resume=True, **given)
        same_losses(straight, stopped)
        same_weights(straight, stopped)


def test_a_mixture_of_0_1_0_keeps_its_balance_loss(runs: Runs, tmp_path: Path) -> None:
    """Its config.yaml has no balance_bound: experts were to get equal shares."""
    run = copy_run(runs.moce, tmp_path / "run")
    content = yaml.safe_load((run / "config.yaml").read_text())
    del content["balance_bound"]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    moce.train(runs.data, mae=runs.mae, clusters=runs.clusters, out=run, resume=True)
    assert read_config(run)["balance_bound"] == 1.0
    with pytest.raises(MoceError, match=r"balance_bound was 1\.0, is 3\.0"):
        moce.train(
            runs.data, mae=runs.mae, clusters=runs.clusters, out=run, resume=True, balance_bound=3.0
        )


def test_a_restored_window_continues_in_the_order_of_its_losses() -> None:
    whole, first, second = (Window(torch.device("cpu")) for _ in range(3))
    losses = [{"loss": torch.tensor(x), "area": torch.tensor(x / 3)} for x in (0.1, 0.7, 1.3)]
    for window, few in ((whole, losses), (first, losses[:2])):
        for one in few:
            window.add(one, 1.0)
            window.steps += 1
    second.load(dict(sorted(first.state().items())))
    second.add(losses[2], 1.0)
    second.steps += 1
    assert list(whole.row(3, 10, 2, 0.1).items()) == list(second.row(3, 10, 2, 0.1).items())
    assert second.times(3, 2)["step_s"] > 0


def test_a_checkpoint_gives_back_all_it_was_given(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    given = Checkpoint(7, {"sum.loss": torch.tensor(0.5)}, {"routes": torch.arange(4)})
    with CheckpointWriter(tmp_path) as checkpoints:
        checkpoints.save(given, model, optimizer)
        with torch.no_grad():
            model.weight += 1  # training goes on meanwhile
            given.diagnostics["routes"] += 1
    before = model.weight - 1
    found = load_checkpoint(tmp_path, model, optimizer)
    assert found is not None and found.step == 7
    assert torch.allclose(model.weight, before)
    assert found.window == given.window and found.diagnostics["routes"].tolist() == [0, 1, 2, 3]


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    write = checkpoint.write_tensors

    def fail(path: Path, *given: object) -> None:
        if path.stem == "step_000000004":
            raise MoceError(f"cannot write {path}: No space left on device")
        write(path, *given)

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    many = {**PRETRAIN, "steps": 100, "save_every": 2}
    with pytest.raises(MoceError, match=r"No space left.*previous checkpoint is kept"):
        moce.pretrain(runs.data, out=tmp_path / "run", **many)
    assert [path.stem for path in (tmp_path / "run" / "state").glob("step*")] == ["step_000000002"]


def test_without_memory_for_a_copy_training_waits_for_the_checkpoint(
    runs: Runs, tmp_path: Path, monkeypatch, capsys
) -> None:
    moce.pretrain(runs.data, out=tmp_path / "copied", **QUICK)
    assert "no memory for a copy" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1000)
    moce.pretrain(runs.data, out=tmp_path / "waited", **QUICK)
    assert "no memory for a copy" in capsys.readouterr().err
    name = "state/step_000000006.safetensors"
    assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "waited" / name).read_bytes()


def test_logs_past_the_checkpoint_are_cut(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    moce.pretrain(runs.data, out=out, **QUICK)
    whole = (out / "metrics.jsonl").read_text()
    (out / "state" / "step_000000006.safetensors").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    with (out / "timings.jsonl").open("a") as file:
        file.write('{"step": 7, "st')
    moce.pretrain(runs.data, out=out, resume=True, **QUICK)
    assert (out / "metrics.jsonl").read_text() == whole
    assert [row["step"] for row in read_timings(out)] == [1, 2, 3, 4, 5, 6]


def test_times_of_older_runs_are_found_in_their_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0, "step_s": 0.25}\n')
    assert read_timings(tmp_path)[0]["step_s"] == 0.25


def test_measuring_the_precision_leaves_the_seed_as_it_is(tmp_path: Path, monkeypatch) -> None:
    """It draws random numbers, and how many depends on the clock."""
    settings = PretrainSettings(data="", out=tmp_path, seed=3, device="cpu")
    monkeypatch.setattr(
        "moce.runtime.device._cpu_precision", lambda threads: f"{torch.rand(threads)}"
    )
    prepare(settings.seed, settings.device, settings.precision, settings.threads)
    assert torch.initial_seed() == 3
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(3)))


# --- what is left behind --------------------------------------------------------------------------


def test_what_a_kill_left_is_removed(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    moce.pretrain(runs.data, out=out, **QUICK)
    left = [out / ".model.safetensors.ab_1cd2e", out / "state/.step_000000009.safetensors.x1y2z3w4"]
    kept = [out / ".gitignore", out / ".my.settings"]
    for path in (*left, *kept):
        path.write_text("half")
    moce.pretrain(runs.data, out=out, resume=True, **QUICK)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)


def test_a_run_killed_before_it_had_a_config_can_begin(runs: Runs, tmp_path: Path) -> None:
    for options in ({"resume": True}, {"overwrite": True}, {}):
        out = tmp_path / f"run{len(options)}{list(options)}"
        out.mkdir()
        (out / ".config.yaml.abcd1234").write_text("se")
        moce.pretrain(runs.data, out=out, **options, **QUICK)
        assert not list(out.glob(".*"))


def test_a_folder_half_emptied_can_still_be_replaced(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "run"
    moce.pretrain(runs.data, out=out, **QUICK)
    unlink, gone = Path.unlink, []

    def dying(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.name)
        if len(gone) == 3:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        moce.pretrain(runs.data, out=out, overwrite=True, **QUICK)
    monkeypatch.undo()
    assert gone[0] == "model.json" and (out / "config.yaml").is_file()
    moce.pretrain(runs.data, out=out, overwrite=True, **QUICK)


def test_a_finished_run_without_checkpoints_is_not_trained_again(
    runs: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    moce.pretrain(runs.data, out=out, **QUICK)
    before = (out / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "state")
    with pytest.raises(MoceError, match="finished"):
        moce.pretrain(runs.data, out=out, resume=True, **QUICK)
    assert (out / "metrics.jsonl").read_bytes() == before


# --- inputs that have changed ---------------------------------------------------------------------


def test_images_that_have_changed_are_refused(runs: Runs, tmp_path: Path) -> None:
    data, out = write_images(tmp_path / "data", per_source=10), tmp_path / "run"
    moce.pretrain(data, out=out, **QUICK)
    next(data.rglob("*.png")).unlink()
    with pytest.raises(MoceError, match=r"data was 40 images \w+, is 39 images"):
        moce.pretrain(data, out=out, resume=True, **QUICK)


@pytest.mark.parametrize("changed", ["mae", "clusters"])
def test_weights_that_have_changed_are_refused(changed: str, runs: Runs, tmp_path: Path) -> None:
    inputs = {name: copy_run(getattr(runs, name), tmp_path / name) for name in ("mae", "clusters")}
    settings = {**TRAIN, **inputs, "steps": 2, "out": tmp_path / "run"}
    moce.train(runs.data, **settings)
    moce.train(runs.data, **settings, resume=True)
    with (inputs[changed] / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\x3f")
    with pytest.raises(MoceError, match=f"inputs have changed: {changed} was weights"):
        moce.train(runs.data, **settings, resume=True)


def test_a_changed_backbone_and_setting_are_refused(runs: Runs, tmp_path: Path) -> None:
    backbone = copy_run(runs.backbone, tmp_path / "backbone")
    settings = {**RUNTIME, "steps": 2, "batch_size": 8, "out": tmp_path / "run"}
    moce.finetune(backbone, runs.task, **settings)
    with pytest.raises(MoceError, match=r"smoothing was 0.1, is 0.2"):
        moce.finetune(backbone, runs.task, **settings, smoothing=0.2, resume=True)
    shutil.copy(runs.mae / "model.safetensors", backbone / "other.safetensors")
    with pytest.raises(MoceError, match="backbone was weights"):
        moce.finetune(backbone, runs.task, **settings, resume=True)


# --- faults ---------------------------------------------------------------------------------------


def command(runs: Runs, out: Path) -> list[str]:
    words = ["pretrain", str(runs.data), "--out", str(out)]
    for name, value in QUICK.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def last_line(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_log_that_cannot_be_written_is_told(
    name: str, runs: Runs, tmp_path: Path, capsys, monkeypatch
) -> None:
    out, opened = tmp_path / "run", Path.open

    def full(path: Path, mode: str = "r", *more: object, **options: object):
        if path.name == name and mode == "a" and len(read_metrics(out)) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", full)
    assert main(command(runs, out)) == 2
    assert f"cannot write {out / name}: No space left on device" in last_line(capsys)
    monkeypatch.undo()
    assert main([*command(runs, out), "--resume"]) == 0
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_cannot_be_made_is_told(runs: Runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(command(runs, tmp_path / "file" / "run")) == 2
    assert f"cannot make {tmp_path / 'file' / 'run'}: " in last_line(capsys)


def test_a_file_in_the_place_of_the_state_is_told(runs: Runs, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main(command(runs, out)) == 0
    shutil.rmtree(out / "state")
    (out / "state").write_text("")
    (out / "model.json").unlink()
    assert main([*command(runs, out), "--resume"]) in (1, 2)
    assert str(out / "state") in last_line(capsys)


def test_what_the_system_refuses_leaves_nothing_half_written(tmp_path: Path, monkeypatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MoceError, match="No space left on device"):
        moce.runs.files.write_text(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(MoceError, match=r"cannot write .*: No such file or directory"):
        moce.runs.files.write_text(tmp_path / "none" / "file", "text")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/disk/photo.png"), 1, "/disk/photo.png: Input"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (MemoryError(), 1, "out of memory; try a smaller --micro-batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "micro-batch-size, or --no-cache-on-gpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted; resume with --resume"),
        (Terminated(), 143, "interrupted; resume with --resume"),
    ],
)
def test_faults_come_out_as_one_line(
    error: BaseException, status: int, words: str, runs: Runs, tmp_path: Path, capsys, monkeypatch
) -> None:
    def fail(*given: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("moce.commands.setup.open_images", fail)
    assert main(command(runs, tmp_path / "run")) == status
    assert words in last_line(capsys)
    assert not (tmp_path / "run").exists()


def test_defects_keep_their_traceback(runs: Runs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moce.commands.setup.open_images", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command(runs, tmp_path / "run"))


def test_averages_that_overflow_reach_no_checkpoint(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    """Weights may be finite still when the averages of AdamW are not: they would never move again."""
    step = AdamW.step

    def overflow(self: torch.optim.Optimizer, *given: object, **more: object) -> None:
        step(self, *given, **more)
        next(iter(self.state.values()))["exp_avg_sq"].fill_(float("inf"))

    monkeypatch.setattr(AdamW, "step", overflow)
    with pytest.raises(NotFinite, match="--base-lr"):
        moce.pretrain(runs.data, out=tmp_path / "run", **QUICK)
    assert not list((tmp_path / "run" / "state").glob("step_*"))


def test_a_mapped_file_that_is_cut_short_is_an_error(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    packed = tmp_path / "photos.moce"
    moce.pack(runs.data, size="16", out=packed)
    whole = load_images(str(packed), (16, 16))
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    images = load_images(str(packed), (16, 16))
    rows = torch.tensor([150, 3, 3])
    assert torch.equal(images.take(rows), whole.pixels[rows])
    assert torch.equal(images.take(slice(155, 200)), whole.pixels[155:])
    assert torch.equal(images.subset([5, 1]).take(slice(None)), whole.pixels[[5, 1]])
    with pytest.raises(IndexError):
        images.take(torch.tensor([len(images)]))
    with packed.open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(MoceError, match="cut short"):
        images.take(rows)
    packed.unlink()  # what is left of an open file can still be read
    assert torch.equal(images.take(torch.tensor([3])), whole.pixels[[3]])
