"""Several processes of one run, started by torchrun: what they make is what one process makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from builders import CLUSTERS, PRETRAIN, RUNTIME, TRAIN, tiny_mae

from moce import launch as launching
from moce.data.batches import own_parts
from moce.launch import ALONE, Launch
from moce.models.experts import apply_experts
from moce.runs import read_metrics, read_tensors
from moce.training.log import flatten

TIMES = {"images_per_s", "step_s", "data_wait_s"}
CLOSE = 1e-5
FINETUNE = {
    **RUNTIME,
    "batch_size": 12,
    "micro_batch_size": None,
    "steps": 4,
    "base_lr": 1e-2,
    "log_every": 1,
    "drop_path": 0.0,
    "rand_augment": "rand-m9-n1",
}


def command(processes: int, verb: str, *words: object, **settings: object) -> list[str]:
    """A command line of moce, under torchrun if there is more than one process."""
    out = next(Path(str(value)) for name, value in settings.items() if name == "out")
    recipe = out.with_name(f"{out.name}.yaml")
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    recipe.write_text(yaml.safe_dump(plain))
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*python, "moce", verb, *map(str, words), "--config", str(recipe)]


def run(processes: int, verb: str, *words: object, **settings: object) -> Path:
    """The folder of a run that has gone well."""
    done = start(command(processes, verb, *words, **settings)).communicate(timeout=300)
    out = Path(str(settings["out"]))
    assert (out / "model.json").is_file(), done[1]
    return out


def start(words: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)


def said(text: str) -> list[str]:
    """The lines of moce's own among those of torchrun."""
    return [line for line in text.splitlines() if line.startswith("moce ")]


def assert_same(one: Path, other: Path, tolerance: float = CLOSE) -> None:
    """Same weights, and same rows but for the clock."""
    first, second = (read_tensors(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=tolerance, rtol=tolerance), name
    rows = [[flatten(row) for row in read_metrics(path)] for path in (one, other)]
    assert len(rows[0]) == len(rows[1]) > 0
    for before, after in zip(*rows, strict=True):
        kept = [{k: v for k, v in row.items() if k not in TIMES} for row in (before, after)]
        assert kept[0] == pytest.approx(kept[1], abs=tolerance, rel=tolerance)


def as_started(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Launch:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launching.launch.cache_clear()
    try:
        return launching.launch()
    finally:
        launching.launch.cache_clear()


# --- quick: without other processes ---------------------------------------------------------------


def test_how_a_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_started(monkeypatch, {}) is ALONE
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "GROUP_RANK": "1"}
    torchrun |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert as_started(monkeypatch, torchrun) == Launch(4, 3, 2, 1, 1, "torchrun")
    assert as_started(monkeypatch, torchrun | {"WORLD_SIZE": "1"}) is ALONE


def test_a_slurm_script_is_several_processes_under_srun_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert as_started(monkeypatch, script) is ALONE
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    step |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    assert as_started(monkeypatch, script | step) == Launch(8, 5, 4, 1, 1, "srun")


@pytest.mark.parametrize(("count", "size"), [(32, None), (32, 4), (33, 5), (7, 100), (8, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_out_a_batch(
    count: int, size: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moce.data.batches as batches
    import moce.processes as shared

    monkeypatch.setattr(shared, "world", lambda: processes)
    monkeypatch.setattr(batches, "world", lambda: processes)
    rows: list[int] = []
    passes = set()
    for here in range(processes):
        monkeypatch.setattr(shared, "rank", lambda here=here: here)
        parts = own_parts(count, size)
        passes.add(len(parts))
        assert all(size is None or part.stop - part.start <= size for part in parts)
        rows += [row for part in parts for row in range(count)[part]]
    assert sorted(rows) == list(range(count))
    assert len(passes) == 1


def test_an_expert_without_images_still_has_gradients_where_others_may_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import moce.models.experts as experts

    layers = torch.nn.ModuleList(tiny_mae().encoder.blocks)
    tokens = torch.randn(3, 5, 32)
    expected = apply_experts(layers, tokens, torch.tensor([0, 2, 0]))
    monkeypatch.setattr(experts, "world", lambda: 2)
    mixed = apply_experts(layers, tokens, torch.tensor([0, 2, 0]))
    assert torch.equal(mixed, expected)
    mixed.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layers[1].parameters())


# --- slow: under torchrun -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(runs) -> dict[str, dict[str, object]]:
    """By method, what a run of it is told."""
    train = {**TRAIN, "steps": 4, "mae": runs.mae, "data": str(runs.data)}
    experts = {**train, "clusters": runs.clusters}
    return {
        "pretrain": {**PRETRAIN, "steps": 4, "data": str(runs.data)},
        "moce": experts,
        "sdr": {**experts, "method": "sdr"},
        # More experts than images in a micro-batch of a process: some idle in one, some in all.
        "idle": {**experts, "num_experts": CLUSTERS, "batch_size": 6, "balance_scope": "batch"},
        "token_moe": {**train, "method": "token_moe", "num_experts": 4},
        "mae": {**train, "method": "mae"},
        "blocks": {**experts, "expert_scope": "block"},
    }


def verb_of(name: str) -> str:
    return "pretrain" if name == "pretrain" else "train"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["pretrain", "moce", "sdr", "idle", "token_moe", "mae", "blocks"])
def test_two_processes_make_what_one_makes(
    name: str, strategy: str, small: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    one = run(1, verb_of(name), **small[name], out=tmp_path / "one")
    two = run(2, verb_of(name), **small[name], out=tmp_path / "two", strategy=strategy)
    assert_same(one, two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert not list(tmp_path.glob(".*"))  # the file of pixels is gone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "idle", "token_moe"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_micro_batches_and_uneven_batches(
    name: str, strategy: str, small: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    """13 images: passes of 3 + 3, 3 + 3 and 1 ... are refused; of 8 and 5, shared as 4 + 4 and 2 + 3."""
    values = {**small[name], "batch_size": 13}
    one = run(1, verb_of(name), **{**values, "micro_batch_size": 8}, out=tmp_path / "one")
    two = {**values, "micro_batch_size": 4, "strategy": strategy}
    assert_same(one, run(2, verb_of(name), **two, out=tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 8])
def test_finetuning_by_two_processes(size: int | None, runs, tmp_path: Path) -> None:
    """With mixup and cutmix, which mix images of one process with those of the other."""
    made = []
    for processes in (1, 2):
        settings = {**FINETUNE, "backbone": str(runs.backbone), "data": str(runs.task)}
        settings |= {
            "micro_batch_size": size and size // processes,
            "out": tmp_path / str(processes),
        }
        made.append(run(processes, "finetune", **settings))
    assert_same(*made)
    results = [json.loads((out / "results.json").read_text()) for out in made]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_stopped_by_sigterm_is_resumed(
    processes: int, strategy: str, small: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    """On as many processes as before, or on one."""
    settings = {**small["moce"], "steps": 100, "base_lr": 1e-3, "save_every": 90}
    whole = run(2, "train", **settings, out=tmp_path / "whole", strategy=strategy)
    stopped = {**settings, "out": tmp_path / "stopped", "strategy": strategy}
    going = start(command(2, "train", **stopped))
    wait_until(lambda: len(read_metrics(tmp_path / "stopped")) > 3)
    going.send_signal(signal.SIGTERM)
    _, told = going.communicate(timeout=60)
    assert going.returncode != 0
    assert len(said(told)) == 1
    assert "saved in" in said(told)[0]
    assert len(list((tmp_path / "stopped" / "state").glob("*.safetensors"))) == 1
    resumed = run(processes, "train", **stopped, resume=True)
    assert_same(whole, resumed)


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_mistake_is_told_once(runs, tmp_path: Path) -> None:
    words = command(2, "pretrain", **PRETRAIN, data=str(tmp_path / "none"), out=tmp_path / "run")
    going = start(words)
    _, told = going.communicate(timeout=120)
    assert going.returncode != 0
    assert len(said(told)) == 1
    assert "no such images" in said(told)[0]


@pytest.mark.slow
def test_verbs_for_one_process_are_refused(runs, tmp_path: Path) -> None:
    words = command(2, "probe", backbone=str(runs.mae), data=str(runs.task), out=tmp_path / "p")
    _, told = start(words).communicate(timeout=120)
    assert said(told) == [
        "moce probe: this is work for one process, and torchrun has started 2; run it without "
        "torchrun"
    ]


@pytest.mark.slow
def test_a_batch_too_small_to_share_is_refused(runs, tmp_path: Path) -> None:
    settings = {**PRETRAIN, "batch_size": 5, "micro_batch_size": 2, "steps": 2}
    words = command(2, "pretrain", **settings, data=str(runs.data), out=tmp_path / "run")
    _, told = start(words).communicate(timeout=120)
    assert len(said(told)) == 1
    assert "without an image" in said(told)[0]


FAILING = """
import sys
import moce.training.loop as loop
from moce.cli import main
from moce.errors import MoceError
from moce.processes import rank

step = loop._Loop._step

def failing(self, number, batches):
    if number == 2 and rank() == 1:
        raise {error}("the disk of this node is gone")
    step(self, number, batches)

loop._Loop._step = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["MoceError", "RuntimeError"])
def test_an_error_of_one_process_ends_all(error: str, runs, tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING.format(error=error))
    settings = {**PRETRAIN, "steps": 6, "data": str(runs.data), "out": tmp_path / "run"}
    words = command(2, "pretrain", **settings)
    words = [*words[: words.index("moce") - 1], str(program), *words[words.index("moce") + 1 :]]
    begun = time.monotonic()
    going = start(words)
    _, told = going.communicate(timeout=120)
    assert going.returncode != 0
    assert told.count("the disk of this node is gone") == 1
    assert "Connection" not in told
    assert time.monotonic() - begun < 60
