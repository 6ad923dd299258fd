"""The how-to pages do what they say: their `sh` and `python` blocks are run, in order.

A page needs an entry in PREPARE: a function that puts what the page takes for granted (small images,
weights, runs) into an empty folder, in which its blocks run. `moce` runs in this process, with the
settings of QUICK where the page does not give them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import RUNTIME
from conftest import Runs

from moce.cli import main
from moce.interop import facebook
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAESpec
from moce.registry import VERBS

PAGES = Path(__file__).parents[1] / "docs" / "howto"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = {**RUNTIME, "batch_size": 64, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


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


PREPARE: dict[str, Callable[[Path, Runs], None]] = {
    "official-weights": official_weights,
    "load-elsewhere": load_elsewhere,
}


def run_command(line: str) -> None:
    """One line of a `sh` block: a command of moce."""
    words = shlex.split(line, comments=True)
    assert words[0] == "moce", f"pages show commands of moce only, not {line}"
    known = VERBS[words[1]].settings.model_fields
    for name, value in QUICK.items():
        flag = f"--{name.replace('_', '-')}"
        if name in known and flag not in words:
            words += [flag, str(value)]
    assert main(words[1:]) == 0, line


def test_every_page_is_run() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == PREPARE.keys()


@pytest.mark.parametrize("page", PREPARE)
def test_page(page: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PREPARE[page](tmp_path, runs)
    monkeypatch.chdir(tmp_path)
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
