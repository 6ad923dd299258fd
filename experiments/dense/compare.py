"""Compare backbones of Mix-32 on dense tasks: MAE, MAE+, token MoE, MoCE's choice, adapted ones.

    python -m experiments.dense.compare --runs runs/mix32_adapted --out runs/dense --jobs 2
    python -m experiments.dense.draw

--runs is the folder of experiments.mix32.run with the recipe cpu_adapted. Rows go to
results/mix32.jsonl; those that are there are passed over, so the same command continues after an
interruption, and with runs that were not there before. See `PROTOCOLS` for what is measured; detect
runs on request only.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import moce
from experiments.dense.frozen import boxes, linear
from experiments.dense.real_tasks import write_task
from experiments.mix32.collect import merge, read_rows
from moce.dense.composed import write_scenes
from moce.evaluation.results import read_rows as read_results
from moce.runs.model import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "mix32.jsonl"
SIDE = 64  # pixels of an image
TRAIN, VAL = 400, 200  # images of a composed task
ADAPT_STEPS = 200

# By name: the run of the seed, and what is made of it for a task.
BACKBONES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "mae_plus": ("main/{seed}/mae_plus", None),
    "moce": ("main/{seed}/moce", {}),
    "mae": ("main/{seed}/mae", None),
    "mae_plus_adapted": ("main/{seed}/mae_plus", {"adapt_steps": ADAPT_STEPS}),
    "moce_adapted": ("main/{seed}/moce", {"adapt_steps": ADAPT_STEPS}),
    "token_moe": ("baselines/{seed}/token_moe", None),
}
TUNED = ("mae_plus", "moce", "mae", "mae_plus_adapted", "moce_adapted")  # plain ViTs
COMMON: dict[str, Any] = {"device": "cpu", "precision": "float32", "threads": 1}
SMALL: dict[str, Any] = {"image_size": SIDE, "jitter": (0.8, 1.25), "drop_path": 0.0, "warmup": 0.1}
UPERNET = {"steps": 200, "batch_size": 16, "base_lr": 3.2e-2, "layer_decay": 0.9}
UPERNET_HEAD = {"kind": "upernet", "dim": 32}
DETECTOR = {"steps": 200, "batch_size": 8, "base_lr": 3.2e-2, "layer_decay": 0.9}
DETECTOR_HEAD = {"dim": 32, "scales": (2, 1, 0.5), "anchor_scale": 4, "depth": 0, "proposals": 32}


# --- tasks --------------------------------------------------------------------------------------------


def write_once(folder: Path, name: str, cache: Path) -> None:
    """Write a task unless it is there."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    if name in ("kinds", "digits"):
        write_scenes(temporary, name, TRAIN, VAL, SIDE)  # type: ignore[arg-type]
    else:
        write_task(temporary, name, cache)
    temporary.rename(folder)


def folder_of_images(task: Path) -> Path:
    """What backbones are chosen and adapted by: the training images, without their labels."""
    images = task / "images" / "train"
    return images if images.is_dir() else task / "train"


# --- backbones ----------------------------------------------------------------------------------------


def backbone_for(name: str, seed: int, task: Path, runs: Path, out: Path) -> Path | None:
    """The backbone of a task, customized now if it is not there; None if its run is not there yet."""
    pattern, customization = BACKBONES[name]
    run = runs / pattern.format(seed=seed)
    if not (run / "model.json").is_file():
        return None
    if customization is None:
        return run
    folder = out / "backbones" / str(seed) / name / task.name
    if not (folder / "README.md").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        related = {}
        if customization:
            clusters = runs / f"main/{seed}/clusters"
            related = {"data": str(runs / "data/pools/all.parquet"), "clusters": clusters}
        moce.customize(
            run=run,
            images=str(folder_of_images(task)),
            out=folder,
            seed=seed,
            **{**customization, **related, **COMMON},
        )
    return folder


# --- protocols ----------------------------------------------------------------------------------------


def tuned(
    settings: dict[str, Any],
    head: dict[str, Any],
    reference: Path,
    task: Path,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """The whole network trained by moce finetune, once; its row of results."""
    given = {**COMMON, **SMALL, **settings, "head_args": head, "seed": seed}
    resume = (out / "config.yaml").is_file()
    if not (out / "model.json").is_file():  # written last
        moce.finetune(backbone=str(reference), data=str(task), out=out, resume=resume, **given)
    (row,) = read_results(out)
    kept = ("metric", "labels", "values", "figures")
    return {name: row[name] for name in kept}


Protocol = Callable[[Path, Path, int, Path], dict[str, Any]]
# By name: what is done, on which tasks, with which backbones. The cheap and telling ones first.
PROTOCOLS: dict[str, tuple[Protocol, tuple[str, ...], tuple[str, ...]]] = {
    "linear": (linear, ("kinds", "emoji", "nuclei"), tuple(BACKBONES)),
    "boxes": (boxes, ("digits", "nuclei"), tuple(BACKBONES)),
    "upernet": (partial(tuned, UPERNET, UPERNET_HEAD), ("kinds",), TUNED),
    "detect": (partial(tuned, DETECTOR, DETECTOR_HEAD), ("digits",), ("mae_plus", "moce")),
}


# --- the run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What a row measures."""

    protocol: str
    task: str
    seed: int
    backbone: str


def cells(protocol: str, seeds: Iterable[int]) -> Iterator[Cell]:
    _, tasks, backbones = PROTOCOLS[protocol]
    for seed, task, backbone in product(seeds, tasks, backbones):
        yield Cell(protocol, task, seed, backbone)


def measure(cell: Cell, runs: Path, out: Path) -> dict[str, Any] | None:
    """The row of a cell; None if the run that it needs is not there yet."""
    torch.set_num_threads(1)
    start = time.process_time()
    task = out / "tasks" / cell.task
    reference = backbone_for(cell.backbone, cell.seed, task, runs, out)
    if reference is None:
        return None
    folder = out / cell.protocol / str(cell.seed) / cell.backbone / cell.task
    found = PROTOCOLS[cell.protocol][0](reference, task, cell.seed, folder)
    return {
        **asdict(cell),
        **found,
        "values": [round(value, 6) for value in found["values"]],
        "figures": {name: round(value, 4) for name, value in found["figures"].items()},
        "cpu_seconds": round(time.process_time() - start, 1),
        "revision": provenance()["git_revision"],
        "command": f"experiments.dense.compare --protocols {cell.protocol} --seeds {cell.seed}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="of experiments.mix32.run")
    parser.add_argument("--out", type=Path, default=Path("runs/dense"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path("runs/mix32/cache"), help="of packages")
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=["linear", "boxes", "upernet"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    given = parser.parse_args()
    done = {tuple(row[f.name] for f in fields(Cell)) for row in read_rows(given.results)}
    for protocol in given.protocols:  # a later one takes the backbones that an earlier one adapted
        todo = [cell for cell in cells(protocol, given.seeds) if astuple(cell) not in done]
        for task in {cell.task for cell in todo}:
            write_once(given.out / "tasks" / task, task, given.cache)
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(measure, cell, given.runs, given.out): cell for cell in todo}
            for future in as_completed(running):
                row = future.result()
                if row is None:
                    print(f"passed over, its run is not there yet: {running[future]}", flush=True)
                else:
                    merge(given.results, [row])
                    print(running[future], row["values"], flush=True)


if __name__ == "__main__":
    main()
