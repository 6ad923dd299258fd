"""The how-to pages do what they say: their `sh` and `python` blocks are run, in order.

A page needs an entry in PREPARE: a function that puts what the page takes for granted (small images,
weights, runs) into an empty folder, in which its blocks run. `moce` runs in this process, with the
settings of QUICK where the page does not give them, a small model where it makes one, and FEWER of
what it asks for.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
import yaml
from builders import RUNTIME, picture
from conftest import Runs

import moce
from moce.cli import main
from moce.commands.registry import COMMANDS
from moce.data.readers.parquet import demo_table
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAESpec
from moce.weights.formats import mae as facebook

PAGES = Path(__file__).parents[1] / "docs" / "howto"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
QUICK = {**RUNTIME, "batch_size": 64, "steps": 1}
FEWER = {"--num-clusters": "8", "--size": "48"}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def official_weights(folder: Path, runs: Runs) -> None:
    """`photos/`, an encoder as released and a training checkpoint, both with heads 64 wide."""
    shutil.copytree(runs.data, folder / "photos")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    mae = MAESpec(EncoderSpec("vit_base_patch16_224", arguments), 32, 1, 16).build()
    encoder, decoder = dict(mae.encoder.state_dict()), dict(mae.decoder.state_dict())
    torch.save({"model": encoder}, folder / "mae_pretrain_vit_base.pth")
    whole = {"model": facebook.join(encoder, decoder), "args": argparse.Namespace(epochs=800)}
    torch.save(whole, folder / "checkpoint-799.pth")


def load_elsewhere(folder: Path, runs: Runs) -> None:
    """`runs/mae`, `runs/moce` and the images of a task, `task/`."""
    shutil.copytree(runs.mae, folder / "runs" / "mae")
    shutil.copytree(runs.moce, folder / "runs" / "moce")
    shutil.copytree(runs.task, folder / "task")


def compare_backbones(folder: Path, runs: Runs) -> None:
    """`runs/mae`, `runs/clusters`, `runs/moce`, their images and two tasks."""
    load_elsewhere(folder, runs)
    shutil.copytree(runs.data, folder / "photos")
    shutil.copytree(runs.clusters, folder / "runs" / "clusters")
    (folder / "task").rename(folder / "birds")
    shutil.copytree(runs.task, folder / "signs")


def detect_and_segment(folder: Path, runs: Runs) -> None:
    """`runs/mae` and the small recipes."""
    shutil.copytree(runs.mae, folder / "runs" / "mae")
    shutil.copytree(PAGES.parents[1] / "recipes", folder / "recipes")


def fine_tune(folder: Path, runs: Runs) -> None:
    """`backbones/birds` and the images of a task, `birds/`."""
    shutil.copytree(runs.backbone, folder / "backbones" / "birds")
    shutil.copytree(runs.task, folder / "birds")


def own_images(folder: Path, runs: Runs) -> None:
    """A folder, a parquet file, a list of both, shards and a saved data set."""
    shutil.copytree(runs.data, folder / "photos")
    pyarrow.parquet.write_table(demo_table().slice(0, 24), folder / "scans.parquet")
    (folder / "list.txt").write_text("photos\nscans.parquet\n")
    for number in range(2):
        with tarfile.open(folder / f"shards-{number:03d}.tar", "w") as archive:
            archive.add(folder / "photos", arcname="photos")
    saved = datasets.Dataset.from_dict({"image": [picture()] * 24})
    saved.save_to_disk(str(folder / "saved"))


def long_jobs(folder: Path, runs: Runs) -> None:
    """`photos/` and their clusters."""
    photos(folder, runs)
    shutil.copytree(runs.clusters, folder / "runs" / "clusters")


def watch_training(folder: Path, runs: Runs) -> None:
    """As for long jobs, and two tasks."""
    long_jobs(folder, runs)
    for name in ("birds", "signs"):
        shutil.copytree(runs.task, folder / name)


def explore(folder: Path, runs: Runs) -> None:
    """`runs/moce` and labeled images, `birds/`."""
    load_elsewhere(folder, runs)
    (folder / "task").rename(folder / "birds")


def photos(folder: Path, runs: Runs) -> None:
    shutil.copytree(runs.data, folder / "photos")


PREPARE: dict[str, Callable[[Path, Runs], None]] = {
    "fine-tune": fine_tune,
    "detect-and-segment": detect_and_segment,
    "official-weights": official_weights,
    "load-elsewhere": load_elsewhere,
    "compare-backbones": compare_backbones,
    "explore": explore,
    "own-images": own_images,
    "multi-channel": lambda folder, runs: None,
    "fast-images": photos,
    "several-processes": photos,
    "long-jobs": long_jobs,
    "watch-training": watch_training,
}


def run_command(line: str) -> None:
    """One line of a `sh` block: a command of moce."""
    words = shlex.split(line, comments=True)
    assert words[0] == "moce", f"pages show commands of moce only, not {line}"
    words = [FEWER.get(before, word) for before, word in pairwise(words)]
    if words[0] == "pretrain" and "--init" not in words:
        words += ["--model-args", json.dumps(SMALL | model_args(words))]
    known = COMMANDS[words[0]].settings.model_fields
    small = DECODER if words[0] == "pretrain" else {}  # other commands read it from the MAE
    for name, value in (QUICK | small).items():
        flag = f"--{name.replace('_', '-')}"
        unused = {"batch_size": "lbfgs", "steps": "--epochs"}.get(name, "") in words
        if name in known and flag not in words and not unused:
            words += [flag, str(value)]
    assert main(words) == 0, line


def model_args(words: list[str]) -> dict[str, object]:
    """Those that the page gives."""
    given = [word for before, word in pairwise(words) if before == "--model-args"]
    return yaml.safe_load(given[-1]) if given else {}


# They take seconds: export to ONNX, train detectors, run many commands.
SLOW = ["load-elsewhere", "detect-and-segment", "compare-backbones", "fast-images", "multi-channel"]


def slow_pages(page: str) -> Any:
    return pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])


def test_every_page_is_run() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == PREPARE.keys()


@pytest.mark.parametrize("page", [slow_pages(page) for page in PREPARE])
def test_page(page: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PREPARE[page](tmp_path, runs)
    monkeypatch.chdir(tmp_path)
    small = partial(moce.pretrain, **QUICK, **DECODER, model_args=SMALL)
    monkeypatch.setattr(moce, "pretrain", small)
    scope: dict[str, object] = {"__name__": page}
    blocks = BLOCK.findall((PAGES / f"{page}.md").read_text())
    assert blocks
    for language, code in blocks:
        if language == "python":
            exec(compile(code, f"{page}.md", "exec"), scope)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                if line.strip():
                    run_command(line)
