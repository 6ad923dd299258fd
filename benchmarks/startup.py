"""How long moce takes to start, beside bare Python: import, --help, and the first step of a training.

    python -m benchmarks.startup            # a minute on an idle machine
    python -m benchmarks.draw               # the tables of docs/performance.md

Each is a fresh process, with its files read before. The first step is that of a small MAE on the
embedded images: it includes the imports of torch, timm and Lightning Fabric, which are timed beside.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import FOLDER, Work, chosen, in_turns, keep, options

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
PARTS = {"import": (QUICK, 15), "first_step": ({BARE: QUICK[BARE], **SLOW}, 2)}
SHORT = {"import": (QUICK, 2)}


def process(arguments: list[str], folder: Path) -> Work:
    command = [sys.executable, *arguments, *([str(folder)] if FIRST_STEP in arguments else [])]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for name, (commands, usual) in chosen(asked.only, SHORT if asked.short else PARTS).items():
            work = {what: process(words, Path(folder) / "run") for what, words in commands.items()}
            rows = in_turns(work, asked.repeats or usual)
            keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
