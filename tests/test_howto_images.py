"""The commands of the pages on images run as they stand, with a small model."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path

import pytest
from builders import PRETRAIN, RUNTIME, picture, write_images

from moce.cli import main
from moce.data.sources import demo_table

PAGES = Path(__file__).parents[1] / "docs" / "howto"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
QUICK = {
    "pretrain": {**PRETRAIN, "epochs": 1},
    "train": {**RUNTIME, "epochs": 1, "batch_size": 32},
    "finetune": {**RUNTIME, "epochs": 1},
    "report": {},
}
SMALLER = "embed_dim: 32, depth: 4, num_heads: 2"


def write_inputs(folder: Path) -> None:
    """What the pages take for granted: a folder, a parquet file, a list, shards, a saved data set."""
    import pyarrow.parquet

    write_images(folder / "photos", per_source=6)
    pyarrow.parquet.write_table(demo_table().slice(0, 24), folder / "scans.parquet")
    (folder / "list.txt").write_text("photos\nscans.parquet\n")
    for number in range(2):
        with tarfile.open(folder / f"shards-{number:03d}.tar", "w") as archive:
            archive.add(folder / "photos", arcname="photos")
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"image": [picture()] * 24})
    saved.save_to_disk(str(folder / "saved"))


def quick(command: str) -> list[str]:
    """The words of a command after `moce`, with settings that make it quick."""
    words = shlex.split(command)[1:]
    settings = dict(QUICK.get(words[0], RUNTIME))
    if "--model-args" in words:
        place = words.index("--model-args") + 1
        words[place] = words[place].replace("}", f", {SMALLER}}}")
        del settings["model_args"]
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return words + [word for flag in flags if flag[0] not in words for word in flag]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["own-images.md", "multi-channel.md"])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, monkeypatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for language, block in BLOCK.findall((PAGES / page).read_text()):
        if language == "python":
            defaults = ", ".join(f"{name}={value!r}" for name, value in QUICK["pretrain"].items())
            exec(re.sub(r"(moce\.pretrain\(.*)\)", rf"\1, {defaults})", block), {})
            continue
        for command in block.strip().splitlines():
            assert main(quick(command)) == 0, command
            ran += 1
    assert ran >= 6
