"""Real commands that are killed, stopped or starved: what they leave and say, and how they go on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import kill
from builders import PRETRAIN, RUNTIME, TRAIN
from conftest import Runs

import moce
from moce.runs.model import read_metrics

pytestmark = pytest.mark.slow
FLAGS = {**PRETRAIN, "epochs": 2000, "log_every": 2, "save_every": 3}


def flags(**settings: object) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def start(*words: object, code: str = "", **options) -> subprocess.Popen[str]:
    """A command of moce; `code` runs before it, in its process.

    It listens to Ctrl-C, also where the tests run in the background of a shell that has turned that off.
    """
    listen = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listen}\n{code}\nfrom moce.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def last_line(process: subprocess.Popen[str], status: int) -> str:
    """The last line of a process that was refused or stopped, without a traceback."""
    _, error = process.communicate(timeout=600)
    assert process.returncode == status, error
    assert "Traceback" not in error and "Exception ignored" not in error, error
    return error.strip().splitlines()[-1]


def wait_for(process: subprocess.Popen[str], ready: Callable[[], object]) -> None:
    end = time.monotonic() + 600
    while process.poll() is None and not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def words_of(command: str, runs: Runs, out: Path) -> list[object]:
    common = {"log_every": 2, "save_every": 3, "epochs": 2000}
    tuned = {"device": "cpu", "precision": "float32", "threads": 1, "batch_size": 8}
    return {
        "pretrain": ["pretrain", runs.data, "--out", out, *flags(**PRETRAIN | common)],
        "train": ["train", runs.data, "--mae", runs.mae, "--clusters", runs.clusters, "--out", out,
                  *flags(**TRAIN | common)],
        "finetune": ["finetune", runs.backbone, runs.task, "--out", out, *flags(**tuned | common)],
    }[command]  # fmt: skip


# --- kills ----------------------------------------------------------------------------------------


def test_runs_killed_at_random_end_as_if_nothing_had_happened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--kills", "3", "--steps", "40", "--seed", "1", "--commands", "moce"]
    assert kill.main(words) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 kills in ")


@pytest.mark.parametrize(("command", "stride"), [("pretrain", 1), ("moce", 4), ("finetune", 4)])
def test_a_run_that_dies_at_any_dealing_with_a_file_goes_on(
    command: str, stride: int, runs: Runs, tmp_path: Path
) -> None:
    words = words_of("train" if command == "moce" else command, runs, tmp_path)
    words = [word for word in words if word not in ("--out", tmp_path, "--epochs", 2000, "2000")]
    short = ["--steps", "5", "--save-every", "3", *(["--lr-grid", "0.1"] * (command == "finetune"))]
    program = [sys.executable, str(Path(__file__).parent / "die_at_writes.py")]
    places = [str(stride), str(tmp_path / "killed"), str(tmp_path / "straight")]
    done = subprocess.run(
        [*program, *places, *map(str, words), *short], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("chances: ")[1]) > 25


def test_a_run_killed_while_a_checkpoint_is_written_goes_on(runs: Runs, tmp_path: Path) -> None:
    """Training is past the step of a checkpoint of which only half is on disk."""
    code = (
        "import time, moce.training.checkpoint as checkpoint\n"
        "write = checkpoint.write_tensors\n"
        "def slow(path, *given):\n"
        "    if path.stem == 'step_000000006':\n"
        "        path.with_name('.step_000000006.safetensors.0123abcd').write_bytes(b'half')\n"
        "        time.sleep(3600)\n"
        "    write(path, *given)\n"
        "checkpoint.write_tensors = slow"
    )
    settings = {**PRETRAIN, "steps": 12, "log_every": 2, "save_every": 3}
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = start("pretrain", runs.data, "--out", killed, *flags(**settings), code=code)
    wait_for(process, lambda: any(row["step"] == 8 for row in read_metrics(killed)))
    process.kill()
    process.communicate()
    assert [path.stem for path in killed.glob("state/step_*")] == ["step_000000003"]
    assert list(killed.glob("state/.step_*"))
    moce.pretrain(runs.data, out=killed, resume=True, **settings)
    moce.pretrain(runs.data, out=straight, **settings)
    assert not list(killed.glob("state/.*"))
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain", "train", "finetune"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    command: str, number: signal.Signals, runs: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(*words_of(command, runs, out))
    wait_for(process, lambda: len(read_metrics(out)) > 2)
    process.send_signal(number)
    line = last_line(process, 128 + number)
    assert "--resume" in line and "stopped after step" in line
    done = int(line.split("step ")[1].split()[0])
    assert (out / "state" / f"step_{done:09d}.safetensors").is_file()
    assert all(row["step"] % 2 == 0 for row in read_metrics(out))


def test_a_second_ctrl_c_stops_at_once(runs: Runs, tmp_path: Path) -> None:
    """No micro-batch is begun after it: eight of eight seconds make up a step, one is waited for."""
    code = (
        "import time, moce.training.objectives as objectives\n"
        "cropped, calls = objectives.cropped, []\n"
        "def slow(*given):\n"
        "    calls.append(1)\n"
        "    time.sleep(8 if len(calls) > 8 * 8 else 0)\n"
        "    return cropped(*given)\n"
        "objectives.cropped = slow"
    )
    out = tmp_path / "run"
    process = start(*words_of("pretrain", runs, out), "--micro-batch-size", 4, code=code)
    wait_for(process, lambda: len(read_metrics(out)) >= 4)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    second = time.monotonic()
    assert "interrupted; resume with --resume" in last_line(process, 130)
    assert time.monotonic() - second < 45


SLOW_IMAGES = (
    "import time, pathlib, moce.data.load as load\n"
    "decode = load._decode_one\n"
    "def slow(*given):\n"
    "    pathlib.Path(MARK).touch(); time.sleep(0.2)\n"
    "    return decode(*given)\n"
    "load._decode_one = slow"
)
SLOW_CLUSTERS = (
    "import time, pathlib, moce.clustering.balanced_kmeans as balanced\n"
    "balanced_potentials = balanced.balanced_potentials\n"
    "def slow(*given, **more):\n"
    "    pathlib.Path(MARK).touch(); time.sleep(0.5)\n"
    "    return balanced_potentials(*given, **more)\n"
    "balanced.balanced_potentials = slow"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [SLOW_IMAGES, SLOW_CLUSTERS], ids=["images", "clusters"])
def test_a_signal_while_images_are_read_or_clustered_is_told_in_one_line(
    code: str, number: signal.Signals, runs: Runs, tmp_path: Path
) -> None:
    mark, out = tmp_path / "mark", tmp_path / "run"
    started = code.replace("MARK", repr(str(mark)))
    quiet = flags(num_clusters=8, device="cpu", precision="float32", threads=1)
    words = ["cluster", runs.data, "--mae", runs.mae, "--out", out, *quiet]
    process = start(*words, code=started)
    wait_for(process, mark.exists)
    process.send_signal(number)
    line = last_line(process, 128 + number)
    if code is SLOW_IMAGES:  # nothing had started that could be resumed
        assert "interrupted" in line
        assert not out.exists()
    else:
        assert "stopped after iteration" in line and "--resume" in line
        assert moce.cluster(runs.data, mae=runs.mae, out=out, resume=True, **RUNTIME).sizes


# --- faults ---------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(runs: Runs, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: some checkpoints fit, the weights do not."""
    out = tmp_path / "run"
    words = words_of("pretrain", runs, out)
    process = start(*words)
    wait_for(process, lambda: list(out.glob("state/step_*")))
    process.send_signal(signal.SIGTERM)
    last_line(process, 143)
    kept = sorted(path.name for path in out.glob("state/step_*"))
    size = min(path.stat().st_size for path in out.glob("state/step_*")) // 2
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    line = last_line(start(*words, "--resume", preexec_fn=limit), 2)
    assert "cannot write" in line and "step_" in line and "--resume" in line
    assert sorted(path.name for path in out.glob("state/step_*")) == kept
    assert not [path for path in out.rglob(".*") if path.is_file()]


def test_a_packed_file_that_is_cut_short_in_mid_run_is_told(runs: Runs, tmp_path: Path) -> None:
    packed, out = tmp_path / "photos.moce", tmp_path / "run"
    assert start("pack", runs.data, "--size", 16, "--out", packed).wait(300) == 0
    code = "import moce.data.load as load\nload.MEMORY_SHARE = 0.0"
    words = words_of("pretrain", runs, out)
    process = start("pretrain", packed, *words[2:], code=code)
    wait_for(process, lambda: list(out.glob("state/step_*")))
    os.truncate(packed, 5000)
    line = last_line(process, 2)
    assert str(packed) in line and "cut short" in line
    assert list(out.glob("state/step_*"))
