"""Commands with one mistake in them, run as a user runs them: what every refusal has to keep to."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from builders import TINY_ARGS, TINY_NAME
from PIL import Image

from moce.cli import main

Words = list[object]
QUIET: Words = ["--threads", "1", "--device", "cpu", "--precision", "float32"]
TINY: Words = [
    *("--model", TINY_NAME, "--model-args", json.dumps(TINY_ARGS), "--decoder-dim", 16),
    *("--decoder-depth", 1, "--decoder-heads", 2, "--epochs", 0.1, "--batch-size", 32),
]


def run_command(words: Words) -> int:
    """The exit status of `moce WORDS`, however the command line ends."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


NOTES = (": left out: ", " take part", "images, scored on ", " looked at (")


def one_line(text: str) -> str:
    """The error in what a command wrote to stderr: one line, the last, without a traceback.

    Lines about the images of a source may come before it.
    """
    lines = [line for line in text.strip().splitlines() if not any(n in line for n in NOTES)]
    assert "Traceback" not in text, text
    errors = [line for line in lines if line.startswith("moce") and ": error: " in line]
    assert len(errors) == 1 and errors == lines[-1:], text
    assert len(lines) == 1, text
    return errors[0]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, link and folder below a folder, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


class World:
    """Commands that would succeed but for what a case changes. folder: an empty one of its own."""

    def __init__(self, runs, folder: Path) -> None:
        self.runs, self.folder, self.out = runs, folder, folder / "out"

    def pretrain(self, data: object = None, *flags: object) -> Words:
        data = self.runs.data if data is None else data
        return ["pretrain", data, "--out", self.out, *QUIET, *TINY, *flags]

    def cluster(self, *flags: object, mae: object = None, data: object = None) -> Words:
        words = ["cluster", data or self.runs.data, "--mae", mae or self.runs.mae]
        return [*words, "--out", self.out, "--num-clusters", 4, *QUIET, *flags]

    def train(self, *flags: object, mae: object = None, clusters: object = None) -> Words:
        words = ["train", self.runs.data, "--mae", mae or self.runs.mae, "--num-experts", 2]
        given = clusters or self.runs.clusters
        return [*words, "--clusters", given, "--out", self.out, "--epochs", 0.1, *QUIET, *flags]

    def headroom(self, *flags: object, mae: object = None, clusters: object = None) -> Words:
        words = ["headroom", self.runs.data, "--mae", mae or self.runs.mae, "--out", self.out]
        return [*words, "--clusters", clusters or self.runs.clusters, *QUIET, *flags]

    def customize(self, *flags: object, run: object = None, images: object = None) -> Words:
        words = ["customize", run or self.runs.moce, images or self.runs.task]
        return [*words, "--out", self.out, *QUIET, *flags]

    def export(self, *flags: object, run: object = None) -> Words:
        return ["export", run or self.runs.mae, "--out", self.out, *flags]

    def convert(self, *flags: object, weights: object = None) -> Words:
        return ["convert", weights or self.runs.mae, "--out", self.file("a.safetensors"), *flags]

    def embed(self, *flags: object, backbone: object = None, data: object = None) -> Words:
        words = ["embed", backbone or self.runs.backbone, data or self.runs.task]
        return [*words, "--out", self.file("a.parquet"), *QUIET, *flags]

    def probe(self, *flags: object, backbone: object = None, data: object = None) -> Words:
        words = ["probe", backbone or self.runs.backbone, data or self.runs.task]
        return [*words, "--out", self.out, *QUIET, *flags]

    def finetune(self, *flags: object, backbone: object = None, data: object = None) -> Words:
        words = ["finetune", backbone or self.runs.backbone, data or self.runs.task]
        return [*words, "--out", self.out, "--epochs", 1, "--batch-size", 16, *QUIET, *flags]

    def evaluate(self, *flags: object, suite: object = None, backbones: object = None) -> Words:
        words = ["evaluate", suite or self.suite(), "--out", self.out]
        return [*words, "--backbones", backbones or f"a={self.runs.backbone}", *QUIET, *flags]

    def report(self, *runs: object) -> Words:
        return ["report", *(runs or (self.runs.mae,)), "--out", self.file("report.html")]

    def pack(self, *flags: object, data: object = None) -> Words:
        words = ["pack", data or self.runs.data, "--size", 16, "--out", self.file("a.moce")]
        return [*words, *flags]

    # --- what commands are given ------------------------------------------------------------

    def file(self, name: str, content: str | bytes | None = None) -> Path:
        """A path in the folder, with a file there if there is content."""
        path = self.folder / name
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def images(self, *names: str) -> Path:
        """A folder of small images, each of its own color."""
        for number, name in enumerate(names):
            path = self.folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number * 37 % 256, number * 91 % 256, 60)).save(path)
        return self.folder / "images"

    def suite(self, **changes: object) -> Path:
        tasks = [{"name": "digits", "data": str(self.runs.task)}]
        content = {"name": "s", "tasks": tasks, "probe": {"solver": "lbfgs"}, **changes}
        return self.file("suite.yaml", json.dumps(content))

    def edited(self, run: str, name: str, content: object = None, **changes: object) -> Path:
        """A copy of a run with a file replaced, or with some values of its JSON changed (None: gone)."""
        copy = Path(shutil.copytree(getattr(self.runs, run), self.folder / f"edited_{run}"))
        path = copy / name
        if changes:
            values = json.loads(path.read_text())
            for key, value in changes.items():
                *inner, last = key.split("__")
                place = values
                for part in inner:
                    place = place[part]
                if value is None:
                    del place[last]
                else:
                    place[last] = value
            content = json.dumps(values)
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
        return copy
