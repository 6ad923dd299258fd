"""Several processes of one run, started by torchrun: what they make is what one process makes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLUSTERS, DENSE, PRETRAIN, RUNTIME, TRAIN, copy_run, tiny_mae
from launched import moce_lines, moce_words, torchrun, wait_until

from moce.commands.registry import COMMANDS
from moce.data.loader import shard_micro_batches
from moce.errors import MoceError
from moce.evaluation.results import read_rows
from moce.models.experts import apply_experts
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics
from moce.runtime import device as hardware
from moce.runtime import fabric as fabrics
from moce.runtime import launch as launching
from moce.runtime.launch import ALONE, Launch
from moce.training.metrics import flatten

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


def without_keys(name: str, values: torch.Tensor) -> torch.Tensor:
    """Biases of keys left out: softmax is blind to them, so AdamW makes whole steps of rounding errors."""
    if not name.endswith("qkv.bias"):
        return values
    query, _, value = values.chunk(3)
    return torch.cat([query, value])


def assert_same(one: Path, other: Path, tolerance: float = CLOSE) -> None:
    """Same weights, and same rows but for the clock."""
    first, second = (read_tensors(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        left, right = (without_keys(name, tensors[name]) for tensors in (first, second))
        assert torch.allclose(left, right, atol=tolerance, rtol=tolerance), name
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


@pytest.mark.parametrize(
    ("seen", "on_node", "index"),
    [(4, "4", 2), (1, "4", 0), (1, None, 0), (1, "1", None), (2, "2", None)],
)
def test_a_slurm_task_takes_the_gpu_it_was_given(
    seen: int, on_node: str | None, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own of those it sees, or the only one it sees; fewer GPUs than tasks are refused."""
    monkeypatch.setattr(hardware, "launch", lambda: Launch(4, 2, 4, 2, 0, "srun"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if on_node is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)
    if index is None:
        with pytest.raises(MoceError, match="--gpu-bind=none"):
            hardware.resolve_device("cuda")
    else:
        assert hardware.resolve_device("cuda") == torch.device("cuda", index)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fabric_takes_the_device_of_a_process(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two tasks, each of which sees one GPU, on the second of two nodes."""
    from lightning_fabric import Fabric

    for name, value in {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3",
                        "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_NAME": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fabrics, "launch", lambda: Launch(4, 3, 2, 1, 1, "srun"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("lightning_fabric.accelerators.cuda.num_cuda_devices", lambda: 1)
    monkeypatch.setattr(Fabric, "launch", lambda self: None)
    fabric = fabrics.open_fabric(torch.device("cuda", 0), "float32", strategy)
    strategy: Any = fabric.strategy
    assert strategy.root_device == torch.device("cuda", 0)
    assert (strategy.num_nodes, strategy.num_processes, strategy.world_size) == (2, 2, 4)
    assert (strategy.global_rank, strategy.local_rank) == (3, 1)


@pytest.mark.parametrize(("count", "size"), [(32, None), (32, 4), (33, 5), (7, 100), (8, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_out_a_batch(
    count: int, size: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moce.data.loader as batches
    import moce.runtime.distributed as shared

    monkeypatch.setattr(shared, "world_size", lambda: processes)
    monkeypatch.setattr(batches, "world_size", lambda: processes)
    rows: list[int] = []
    passes = set()
    for here in range(processes):
        monkeypatch.setattr(shared, "rank", lambda here=here: here)
        parts = shard_micro_batches(count, size)
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
    monkeypatch.setattr(experts, "world_size", lambda: 2)
    mixed = apply_experts(layers, tokens, torch.tensor([0, 2, 0]))
    assert torch.equal(mixed, expected)
    mixed.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layers[1].parameters())


# --- slow: under torchrun -------------------------------------------------------------------------


EVEN = [(name, "ddp") for name in ("pretrain", "idle", "token_moe", "moce", "sdr", "mae")]
EVEN += [(name, "fsdp") for name in ("idle", "token_moe", "pretrain", "blocks")]
EVEN += [("saving", "ddp"), ("saving", "fsdp"), ("saving_token_moe", "fsdp")]
UNEVEN = [("token_moe", "ddp"), ("idle", "ddp"), ("idle", "fsdp")]


def command_of(name: str) -> str:
    return name if name in ("pretrain", "finetune") else "train"


@dataclass
class Made:
    """Runs of two processes, all by one torchrun; runs of this process are made when asked for."""

    settings: dict[str, dict[str, Any]]
    folder: Path

    def by_two(self, name: str) -> Path:
        out = self.folder / name
        errors = [path.read_text() for path in self.folder.glob(f"{name}.error.*")]
        assert not errors, errors[0]
        return out

    def by_one(self, name: str, **update: Any) -> Path:
        out = self.folder / f"one_{name}"
        if not out.exists():
            COMMANDS[command_of(name)].run({**self.settings[name], **update, "out": out})
        return out


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By method, the settings of its run, and what two processes made of it."""
    at_four_steps = {"steps": 4, "mae": str(runs.mae), "data": str(runs.data)}
    train = {**TRAIN, **at_four_steps}
    experts = {**train, "clusters": str(runs.clusters)}
    monitored = {**experts, "monitor": [str(runs.task)], "monitor_every": 2}
    settings = {
        "pretrain": {**PRETRAIN, "steps": 4, "data": str(runs.data)},
        "moce": monitored,
        "sdr": {**experts, "method": "sdr"},
        # As many experts as clusters, few images: some experts are idle in one process, some in all.
        "idle": {**experts, "num_experts": CLUSTERS, "batch_size": 6, "balance_scope": "batch"},
        "token_moe": {**train, "method": "token_moe", "num_experts": 4},
        "mae": {**at_four_steps, **DENSE, "method": "mae"},
        "blocks": {**experts, "expert_scope": "block"},
        "saving": {**experts, "clip_grad": 0.05, "grad_checkpointing": True},
        "saving_token_moe": {**train, "method": "token_moe", "grad_checkpointing": True},
        "finetune": {**FINETUNE, "backbone": str(runs.backbone), "data": str(runs.task)},
    }
    folder = tmp_path_factory.mktemp("several")
    jobs = {}
    for name, strategy in EVEN:
        jobs[f"{name}_{strategy}"] = (name, {"strategy": strategy})
    for size in (4, None):
        jobs[f"finetune_{size}"] = ("finetune", {"micro_batch_size": size})
    for name, strategy in UNEVEN:  # passes of 8 and 5 images, shared as 4 + 4 and 2 + 3
        update = {"strategy": strategy, "batch_size": 13, "micro_batch_size": 4}
        jobs[f"uneven_{name}_{strategy}"] = (name, update)
    listed = [
        {
            "command": command_of(name),
            "settings": {**settings[name], **update, "out": str(folder / job)},
        }
        for job, (name, update) in jobs.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(listed))
    _, output = torchrun(Path(__file__).with_name("run_jobs.py"), folder / "jobs.json").communicate(
        timeout=600
    )
    assert (folder / "finetune_4").exists(), output
    return Made(settings, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), EVEN)
def test_two_processes_make_what_one_makes(name: str, strategy: str, made: Made) -> None:
    one, two = made.by_one(name), made.by_two(f"{name}_{strategy}")
    assert_same(one, two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert not list(made.folder.glob(".*"))  # the file of pixels is gone


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), UNEVEN)
def test_micro_batches_and_uneven_batches(name: str, strategy: str, made: Made, tmp_path) -> None:
    update = {"batch_size": 13, "micro_batch_size": 8}
    COMMANDS[command_of(name)].run({**made.settings[name], **update, "out": tmp_path / "one"})
    assert_same(tmp_path / "one", made.by_two(f"uneven_{name}_{strategy}"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 4])
def test_finetuning_by_two_processes(size: int | None, made: Made, tmp_path: Path) -> None:
    """With mixup and cutmix, which mix images of one process with those of the other."""
    update = {"micro_batch_size": size and 2 * size, "out": tmp_path / "one"}
    COMMANDS["finetune"].run({**made.settings["finetune"], **update})
    two = made.by_two(f"finetune_{size}")
    assert_same(tmp_path / "one", two)
    results = [read_rows(out) for out in (tmp_path / "one", two)]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_stopped_by_sigterm_is_resumed(strategy: str, made: Made, tmp_path: Path) -> None:
    """On as many processes as before, and on one."""
    out = tmp_path / "stopped"
    # So few steps because FSDP on CPUs can corrupt memory (docs/log.md), enough to be stopped.
    settings = {**made.settings["moce"], "steps": 28, "base_lr": 1e-3, "save_every": 90}
    settings["monitor_every"] = 10
    going = torchrun(*moce_words("train", {**settings, "out": out, "strategy": strategy}))
    wait_until(lambda: len(read_metrics(out)) > 3)
    going.send_signal(signal.SIGTERM)
    _, output = going.communicate(timeout=600)
    assert going.returncode != 0
    assert len(moce_lines(output)) == 1, output
    assert "saved in" in moce_lines(output)[0]
    assert len(list((out / "state").glob("*.safetensors"))) == 1
    copied = copy_run(out, tmp_path / "copied")
    going_on = torchrun(*moce_words("train", {**settings, "out": out, "resume": True}))
    _, output = going_on.communicate(timeout=600)
    assert going_on.returncode == 0, output
    for folder, more in ((copied, {"resume": True}), (tmp_path / "whole", {})):
        COMMANDS["train"].run({**settings, "out": folder, **more})
    assert_same(tmp_path / "whole", out)
    assert_same(tmp_path / "whole", copied)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "update", "line"),
    [
        ("pretrain", {"data": "nowhere"}, "no such images"),
        ("pretrain", {"batch_size": 5, "micro_batch_size": 2, "steps": 2}, "without an image"),
        ("pack", {}, "runs in one process, but torchrun started 2"),
    ],
)
def test_a_mistake_is_told_once(
    command: str, update: dict, line: str, runs, tmp_path: Path
) -> None:
    settings = {**PRETRAIN, "data": str(runs.data)} if command == "pretrain" else {}
    settings = settings or {"data": str(runs.task)}
    going = torchrun(*moce_words(command, {**settings, **update, "out": tmp_path / "run"}))
    _, output = going.communicate(timeout=600)
    assert going.returncode != 0
    assert len(moce_lines(output)) == 1, output
    assert line in moce_lines(output)[0]


FAILING = """
import sys
import moce.training.trainer as trainer
from moce.cli import main
from moce.errors import MoceError
from moce.runtime.distributed import rank

step = trainer._Trainer._step

def failing(self, number, batches):
    if number == 2 and rank() == 1:
        raise {error}("the disk of this node is gone")
    step(self, number, batches)

trainer._Trainer._step = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["MoceError", "RuntimeError"])
def test_an_error_of_one_process_ends_all(error: str, runs, tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING.format(error=error))
    settings = {**PRETRAIN, "steps": 6, "data": str(runs.data), "out": tmp_path / "run"}
    going = torchrun(program, *moce_words("pretrain", settings)[2:])
    _, output = going.communicate(timeout=600)
    assert going.returncode != 0
    lines = [line for line in output.splitlines() if "the disk of this node is gone" in line]
    # A MoceError is one line; what nobody expected comes with its traceback, in which it stands twice.
    assert len(lines) == (1 if error == "MoceError" else 2), output
    assert "Connection" not in output
