"""How long moce takes to start: import, --help, the first step of a training, a customized backbone.

    python -m benchmarks.startup            # five minutes on an idle machine
    python -m benchmarks.draw               # the tables of docs/performance.md

Each is a fresh process, with its files read before. The first step is that of a small MAE on the
embedded images: it includes the imports of torch and timm, which are timed beside. customize gets 100
photographs and a random ViT-B with eight experts in two blocks; beside it, a process that imports torch
and timm and passes 100 images, which it need not read, through a ViT-B once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import FOLDER, Work, chosen, in_turns, keep, options
from benchmarks.selection import Case, bank_of
from moce.runs.model import write_model

RESULTS = FOLDER / "startup.json"
PACKAGES = ("moce", "torch", "timm", "lightning-fabric", "pydantic")
BARE = "bare Python"
FIRST_STEP = """
import sys, moce
moce.pretrain("demo:pretrain", out=sys.argv[1], overwrite=True, model="vit_tiny_patch16_224",
    model_args={"patch_size": 4, "img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2},
    decoder_dim=32, decoder_depth=1, decoder_heads=2, steps=1, batch_size=32, device="cpu",
    precision="float32")
"""
QUICK = {
    BARE: ["-c", "pass"],
    "import moce": ["-c", "import moce"],
    "moce --help": ["-m", "moce", "--help"],
    "moce pretrain --help": ["-m", "moce", "pretrain", "--help"],
}
SLOW = {
    "import torch": ["-c", "import torch"],
    "import torch, timm": ["-c", "import torch, timm"],
    "import torch, timm, lightning_fabric": ["-c", "import torch, timm, lightning_fabric"],
    "pretrain, one step": ["-c", FIRST_STEP],
}
FORWARD = """
import sys, torch, timm
with torch.device("meta"):
    vit = timm.create_model(sys.argv[1], num_classes=0, img_size=int(sys.argv[2]))
vit = vit.to_empty(device="cpu").eval()
with torch.inference_mode():
    for parameter in vit.parameters():
        parameter.zero_()
    vit(torch.rand(int(sys.argv[3]), 3, int(sys.argv[2]), int(sys.argv[2])))
"""
PASS, CUSTOMIZE = "import torch, timm; one forward pass", "moce customize"
COUNT = 100  # images to customize by
PARTS = {
    "import": (QUICK, 15),
    "first_step": ({BARE: QUICK[BARE], **SLOW}, 3),
    "customize": ("vit_base_patch16_224", 3),
}
SHORT = {"import": (QUICK, 2), "customize": ("vit_tiny_patch16_224", 1)}
SIZES_OF = {"vit_base_patch16_224": ("vit_b", 224), "vit_tiny_patch16_224": ("vit_ti", 224)}


def process(arguments: list[str], folder: Path) -> Work:
    command = [sys.executable, *arguments, *([str(folder)] if FIRST_STEP in arguments else [])]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def random_run(size: str, folder: Path) -> None:
    """A run of `moce train` with random weights: time does not depend on what they are."""
    bank = bank_of(Case(size, 0, 64))
    tensors = {f"model.{name}": value for name, value in bank.model.state_dict().items()}
    tensors |= {f"clusters.{name}": value for name, value in bank.clusters.tensors().items()}
    folder.mkdir()
    info = {"spec": bank.spec.to_dict(), "clusters": bank.clusters.info(), "metrics": {}}
    write_model(folder, "moce", tensors, info)


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of 500 x 400 with smooth random colors."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (20, 25, 3), dtype=np.uint8))
        coarse.resize((500, 400), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def customizing(model: str, folder: Path) -> dict[str, list[str]]:
    """The commands of the part: what nobody can do without, and `moce customize`."""
    size, side = SIZES_OF[model]
    run, images, out = (folder / name for name in ("moce", "images", "backbone"))
    random_run(size, run)
    write_photographs(images, COUNT)
    settings = ["--out", str(out), "--overwrite", "--device", "cpu", "--precision", "float32"]
    return {
        BARE: QUICK[BARE],
        "import torch, timm": SLOW["import torch, timm"],
        PASS: ["-c", FORWARD, model, str(side), str(COUNT)],
        CUSTOMIZE: ["-m", "moce", "customize", str(run), str(images), *settings],
    }


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for name, (commands, usual) in chosen(asked.only, SHORT if asked.short else PARTS).items():
            if isinstance(commands, str):
                commands = customizing(commands, Path(folder))
            work = {what: process(words, Path(folder) / "run") for what, words in commands.items()}
            rows = in_turns(work, asked.repeats or usual)
            keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
