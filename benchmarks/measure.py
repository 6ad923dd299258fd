"""What the benchmarks have in common: steps timed in turns, peak memory, the machine, kept results."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]
Work = Callable[[], object]
MEGABYTE = 2**20


def options(doc: str, parts: Iterable[str], results: Path) -> argparse.ArgumentParser:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", help=f"parts, with commas between, of: {', '.join(parts)}")
    parser.add_argument("--short", action="store_true", help="a look: small cases, few repeats")
    parser.add_argument("--repeats", type=int, help="turns of each candidate")
    parser.add_argument("--out", type=Path, default=results)
    return parser


def chosen(only: str | None, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts that were asked for (None: all). Ends the program for one that there is not."""
    names = only.split(",") if only else list(parts)
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise SystemExit(f"no part '{unknown[0]}'; there are {', '.join(parts)}")
    return {name: parts[name] for name in names}


def keep(path: Path, part: str, rows: list[Row], packages: Iterable[str], *, short: bool) -> None:
    """Put the rows of a part, with what they were measured on, in the place of its earlier ones."""
    found = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    found["parts"][part] = {"machine": machine(packages), "short": short, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


# --- time ---------------------------------------------------------------------------------------------


def seconds_of(work: Work, device: torch.device) -> float:
    """How long a step takes: by the wall clock, or by the events of a CUDA device."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def in_turns(
    work: dict[str, Work],
    repeats: int,
    warmups: int = 1,
    device: torch.device | None = None,
    **labels: Any,
) -> list[Row]:
    """Rows of every candidate's seconds: warm-ups, then one step of each in every turn.

    Every other turn is in reverse order. A step finds caches and memory as the one before left
    them: a dense ViT-Ti, always the first of eight, took 1.1 times as long as its mixtures.
    """
    device = device or torch.device("cpu")
    for step in work.values():
        for _ in range(warmups):
            step()
    rows = []
    candidates = list(work.items())
    for repeat in range(repeats):
        for name, step in candidates if repeat % 2 == 0 else reversed(candidates):
            seconds = seconds_of(step, device)
            rows.append({**labels, "candidate": name, "repeat": repeat, "seconds": seconds})
            print(*labels.values(), f"{name:36} {seconds:9.4f} s", flush=True)
    return rows


def per_second(rows: list[Row], count: int) -> list[Row]:
    """The rows with images per second, of `count` images each."""
    return [{**row, "images_per_s": round(count / row["seconds"], 3)} for row in rows]


# --- memory -------------------------------------------------------------------------------------------


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a fresh process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes() -> int:
    """Memory of this process that is in use now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def high_water_bytes() -> int:
    """The most memory that this process has used so far (Linux; getrusage's counts its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_bytes(build: Callable[[], Work], device: torch.device, steps: int = 2) -> int:
    """Most memory that building a candidate and its steps take beyond what there was before.

    To be called in a process of its own (`in_child`): high water never falls.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident_bytes()
    step = build()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return high_water_bytes() - before


# --- the machine --------------------------------------------------------------------------------------


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[
            0
        ],  # of other programs too: it says how idle the machine was
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := version_of(name))},
        "revision": git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no", "--", "src")),
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
