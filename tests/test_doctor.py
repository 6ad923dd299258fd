"""moce doctor: what it shows, what it calls unusable, and what it advises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import RUNTIME
from commands import one_line, run_command
from packaging.requirements import Requirement

import moce
from moce.commands import doctor
from moce.commands.doctor import DoctorResult, _of_the_rest, _of_threads
from moce.runtime import system as machine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products of large matrices."""
    rates = {torch.float32: 100e9, torch.bfloat16: 250e9}
    monkeypatch.setattr(doctor, "matmul_rate", lambda device, kind: rates[kind])
    monkeypatch.setattr(doctor, "resolve_precision", lambda wanted, device: "bf16")


@pytest.fixture
def healthy() -> DoctorResult:
    return DoctorResult(
        versions={}, extras={}, device="cpu", devices=["cpu"], precision="float32",
        threads=8, omp_num_threads=None, cores=8, usable_cores=8,
        cpu_limit=None, matmul_float32=1.0, matmul_bf16=1.0, disk=".", disk_free=100.0,
    )  # fmt: skip


def test_it_shows_versions_devices_precision_threads_disk_rates_and_extras(
    tmp_path: Path, capsys
) -> None:
    assert run_command(["doctor", "--out", tmp_path / "not" / "there"]) == 0
    shown = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in shown.splitlines() if " " in line)
    assert lines["torch"] == torch.__version__.split("+")[0] or torch.__version__ in shown
    assert lines["precision"] == "bf16"
    assert lines["threads"].startswith(f"{torch.get_num_threads()} (OMP_NUM_THREADS is")
    assert "100 GFLOP/s" in shown and "250 GFLOP/s" in shown
    assert f"GB for {tmp_path}/not/there" in shown
    for extra in ("onnx", "tensorboard", "hf", "tiff"):
        assert f"extra {extra}" in shown
    assert "extra dev" not in shown and "cpu (" in shown
    assert "nothing to fix" in shown or "to fix:" in shown
    assert not (tmp_path / "not").exists()


def test_json_has_the_same(tmp_path: Path, capsys) -> None:
    assert run_command(["doctor", "--json", "--out", tmp_path]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unusable"] == [] and found["device"] in ("cpu", "cuda", "mps")
    assert found["matmul_float32"] == 100 and found["extras"]["onnx"] == []
    assert {"advice", "threads", "cpu_limit", "usable_cores", "disk_free"} <= found.keys()


def test_a_package_that_is_too_old_or_missing_makes_it_unusable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    needed = [Requirement("torch>=99"), Requirement("no-such-package>=1"), Requirement("timm")]
    monkeypatch.setattr(doctor, "_requirements", lambda: needed)
    assert run_command(["doctor", "--out", tmp_path]) == 1
    shown = capsys.readouterr().out
    assert f"! torch is {doctor._version('torch')}, but moce needs >=99: pip install -U" in shown
    assert "! no-such-package is not installed" in shown and "! timm" not in shown


def test_a_place_that_cannot_be_written_to_is_unusable(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in moce.doctor(out=tmp_path / "file" / "runs").unusable[0]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    result = moce.doctor(out=tmp_path)
    assert "is not writable" in result.unusable[0] and result.exit_status == 1


def test_a_missing_extra_is_shown_with_the_command_and_is_no_fault(monkeypatch, tmp_path) -> None:
    needed = [Requirement("no-such-package; extra == 'onnx'")]
    monkeypatch.setattr(doctor, "_requirements", lambda: needed)
    result = moce.doctor(out=tmp_path)
    assert result.extras["onnx"] == ["no-such-package"] and result.exit_status == 0
    assert "missing no-such-package: pip install 'moce[onnx]'" in result.summary()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, None),
        ({"threads": 1, "omp_num_threads": "1"}, "only 1 of 8 cores are used"),
        ({"threads": 4}, "only 4 of 8 cores are used: add --threads 8"),
        ({"cpu_limit": 2.0}, "8 threads share 2 cores' worth of time: set OMP_NUM_THREADS=2"),
        ({"cpu_limit": 0.5}, "8 threads share 0.5 cores' worth of time: set OMP_NUM_THREADS=1"),
        ({"cpu_limit": 2.0, "threads": 2, "omp_num_threads": "2"}, None),
        ({"cpu_limit": 64.0}, None),
        ({"usable_cores": 4}, "8 threads share 4 cores' worth of time"),
    ],
)
def test_advice_on_threads(healthy: DoctorResult, changes: dict, advice: str | None) -> None:
    found = _of_threads(replace(healthy, **changes))
    assert len(found) == (advice is not None) and (advice or "") in "".join(found)


def test_advice_on_disk_and_other_programs(healthy: DoctorResult, monkeypatch) -> None:
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert _of_the_rest(healthy) == []
    assert "5 GB" in _of_the_rest(replace(healthy, disk_free=1.0))[0]
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "other programs" in _of_the_rest(healthy)[0]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "junk"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_is_read(files: dict, limit: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cpu_limit(tmp_path) == limit


GB = 2**30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable:   8388608 kB\n"


def write_files(root: Path, files: dict[str, str | int]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GB),  # the page cache is free
        ({"memory.max": 4 * GB, "memory.current": GB}, 3 * GB),
        ({"memory.max": 4 * GB, "memory.current": 4 * GB, "memory.stat": f"anon 1\ninactive_file {GB}"}, GB),
        ({"memory.max": GB, "memory.current": 2 * GB}, 0),
        ({"memory.max": "max", "memory.current": GB}, 8 * GB),
        ({"memory.max": 64 * GB, "memory.current": GB}, 8 * GB),
        ({"memory.max": 6 * GB, "memory.current": 0, "job/memory.max": GB, "job/memory.current": 0}, GB),
        ({"memory.max": 6 * GB, "memory.current": 0, "job/memory.max": "max", "job/memory.current": 0}, 6 * GB),
    ],
)  # fmt: skip
def test_free_memory_is_the_tightest_limits(files: dict, free: int, tmp_path: Path) -> None:
    proc = {"meminfo": MEMINFO, "self/cgroup": "0::/job"}
    write_files(tmp_path / "proc", proc)
    write_files(tmp_path / "cgroup", files)
    assert machine.free_memory(tmp_path / "cgroup", tmp_path / "proc") == free
    (tmp_path / "proc" / "self" / "cgroup").unlink()
    if not any(name.startswith("job") for name in files):
        assert machine.free_memory(tmp_path / "cgroup", tmp_path / "proc") == free


def test_free_memory_of_older_control_groups_and_where_nothing_tells(
    tmp_path: Path, monkeypatch
) -> None:
    write_files(
        tmp_path, {"meminfo": MEMINFO, "self/cgroup": "5:cpu:/a\n4:memory,x:/docker/12\n0::/"}
    )
    limits = {
        "limit_in_bytes": 3 * GB,
        "usage_in_bytes": 2 * GB,
        "stat": f"total_inactive_file {GB}",
    }
    write_files(tmp_path / "memory", {f"memory.{name}": value for name, value in limits.items()})
    assert machine.free_memory(tmp_path, tmp_path) == 2 * GB
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert machine.free_memory(tmp_path, tmp_path) == 8 * GB
    nowhere = tmp_path / "nowhere"
    assert machine.free_memory(nowhere, nowhere) > 0
    monkeypatch.delattr(machine.os, "sysconf")
    assert machine.free_memory(nowhere, nowhere) == 4 * GB


@pytest.mark.parametrize(("limit", "threads"), [(None, 4), (1.5, 2), (0.5, 1), (16.0, 4)])
def test_threads_that_work_are_those_that_a_container_lets_run(
    limit: float | None, threads: int, monkeypatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "cpu_limit", lambda: limit)
    assert machine.worker_threads() == threads


def test_names_of_processors(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert machine.cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert machine.cpu_name(tmp_path / "none")


def test_a_mistake_of_the_caller_is_still_an_error(capsys) -> None:
    assert run_command(["doctor", "--threads", RUNTIME["threads"]]) == 2
    assert "unknown argument --threads" in one_line(capsys.readouterr().err)
