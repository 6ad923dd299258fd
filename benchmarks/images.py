"""Speed of reading images for training, beside other loaders; what training waits; the first step.

    python -m benchmarks.images              # six minutes on two idle cores
    python -m benchmarks.images --short      # a look: fewer images and turns
    python -m benchmarks.images --only large # some parts: small, large, tiny, waiting, first_step
    python -m benchmarks.draw                # the tables of docs/performance.md from the results

small, large: batches of 224 from JPEGs of 500 x 400 and of 12 megapixels, random crops of scikit-learn's two
sample photographs, the large ones enlarged. Every candidate returns float32 batches after a random
resized crop (bicubic, antialiased, scale 0.2 to 1), a flip and normalization, with two workers; a turn is
an epoch. tiny: the same of 32 x 32 PNGs, which moce keeps decoded. waiting: the share of a step that `moce
pretrain` of a ViT-S waits for its batch. first_step: a process from start to the end of its first step,
on 100 and on 100,000 files. Needs: pip install 'moce[hf]'.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import moce
from benchmarks.measure import FOLDER, Row, Work, chosen, in_turns, keep, options, per_second
from moce.data.augment import normalize
from moce.data.load import open_images
from moce.data.loader import BatchOrder, Loading, view_batches
from moce.data.views import Views
from moce.runs.model import read_timings

RESULTS = FOLDER / "images.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("moce", "torch", "torchvision", "timm", "pillow", "numpy", "datasets")
WORKERS = 2
FEW, MANY, COPIES = (
    100,
    100_000,
    1000,
)  # files; links to each, as a file system allows no more than some
VIT_S = {"model": "vit_small_patch16_224", "batch_size": 32}
TINY_VIT = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16},
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "batch_size": 32,
}
FIRST_STEP = "import sys, moce; moce.pretrain(*eval(sys.argv[1]), **eval(sys.argv[2]))"


@dataclass(frozen=True)
class Case:
    """file: height, width and suffix of the files. size: of the batches' images."""

    name: str
    file: tuple[int, int, str]
    size: int
    images: int
    batch: int


CASES = {
    "small": Case("small", (400, 500, ".jpg"), 224, 3072, 64),
    "large": Case("large", (3000, 4000, ".jpg"), 224, 96, 16),
    "tiny": Case("tiny", (32, 32, ".png"), 32, 4096, 256),
}
TURNS = 5


def write_files(folder: Path, case: Case, count: int) -> Path:
    """Random crops of two photographs, enlarged if they are too small, in one class folder each."""
    random = np.random.default_rng(0)
    height, width, suffix = case.file
    for label, pixels in enumerate(load_sample_images().images):
        (folder / str(label)).mkdir(parents=True)
        photo = Image.fromarray(pixels)
        factor = max(1.0, 1.1 * height / photo.height, 1.1 * width / photo.width)
        photo = photo.resize((round(photo.width * factor), round(photo.height * factor)))
        for number in range(count // 2):
            top = int(random.integers(photo.height - height + 1))
            left = int(random.integers(photo.width - width + 1))
            crop = photo.crop((left, top, left + width, top + height))
            crop.save(folder / str(label) / f"{number:04d}{suffix}", quality=90)
    return folder


# --- batches ready for training -------------------------------------------------------------------------


def an_epoch(batches: Iterable, count: Callable[[object], int]) -> Work:
    return lambda: sum(count(batch) for batch in batches)


def loader(data: object, case: Case) -> DataLoader:
    return DataLoader(
        data,  # type: ignore[arg-type]
        case.batch,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )


def transform(case: Case) -> v2.Compose:
    cut = v2.RandomResizedCrop(
        case.size, scale=(0.2, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([cut, v2.RandomHorizontalFlip(), *to_float])


def torchvision_batches(folder: Path, case: Case) -> Work:
    return an_epoch(loader(ImageFolder(folder, transform(case)), case), lambda batch: len(batch[0]))


class _Transform:
    """A class, because worker processes need to pickle it."""

    def __init__(self, case: Case) -> None:
        self._steps = transform(case)

    def __call__(self, rows: dict) -> dict:
        return {"image": [self._steps(image) for image in rows["image"]], "label": rows["label"]}


def huggingface_batches(folder: Path, case: Case) -> Work:
    import datasets

    paths = sorted(str(path) for path in folder.rglob("*.*"))
    labels = [int(Path(path).parent.name) for path in paths]
    table = datasets.Dataset.from_dict({"image": paths, "label": labels})
    table = table.cast_column("image", datasets.Image()).with_transform(_Transform(case))
    return an_epoch(loader(table, case), lambda batch: len(batch["image"]))


def timm_batches(folder: Path, case: Case) -> Work:
    from timm.data import create_dataset, create_loader

    batches = create_loader(
        create_dataset("", str(folder)),
        (3, case.size, case.size),
        case.batch,
        is_training=True,
        use_prefetcher=False,
        scale=(0.2, 1.0),
        hflip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=WORKERS,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    return an_epoch(batches, lambda batch: len(batch[0]))


def moce_batches(folder: Path, case: Case) -> Work:
    """What precedes a training step's forward pass; starts its workers in every turn, to its disadvantage."""
    size = (case.size, case.size)
    images = open_images(str(folder), size)
    views = Views(seed=0, size=size, smallest_crop=0.2, hflip=True)
    steps = len(images) // case.batch
    order = BatchOrder(len(images), case.batch, seed=0)
    cpu, workers = torch.device("cpu"), Loading(workers=WORKERS)

    def epoch() -> int:
        rows = order.micro_batches(0, steps, None)
        with closing(view_batches(images, rows, cpu, views, workers)) as batches:
            return sum(len(normalize(batch.views(views), MEAN, STD)) for batch in batches)

    return epoch


LOADERS = {
    "moce": moce_batches,
    "torchvision": torchvision_batches,
    "timm": timm_batches,
    "datasets": huggingface_batches,
}


def loading(name: str, root: Path, repeats: int | None, *, short: bool) -> list[Row]:
    case = CASES[name]
    count = max(2 * case.batch, case.images // 12) if short else case.images
    folder = write_files(root / name, case, count)
    work = {candidate: make(folder, case) for candidate, make in LOADERS.items()}
    rows = in_turns(work, repeats or (2 if short else TURNS), part=name)
    return per_second(rows, count // case.batch * case.batch)


# --- training -------------------------------------------------------------------------------------------


def waiting(root: Path, repeats: int | None, *, short: bool) -> list[Row]:
    """A row for each step but the first, which waits for the first batch."""
    folder = write_files(root / "waiting", CASES["small"], 128)
    settings = {**VIT_S, "batch_size": 8} if short else VIT_S
    out = root / "run"
    moce.pretrain(folder, out=out, steps=repeats or (3 if short else 12), log_every=1, **settings)
    return [
        {"candidate": "wait", "repeat": n, "seconds": row["data_wait_s"], "step": row["step_s"]}
        for n, row in enumerate(read_timings(out)[1:])
    ]


def first_step(root: Path, repeats: int | None, *, short: bool) -> list[Row]:
    """Processes that make one step, on few files and on links to them."""
    files = sorted(write_files(root / "few", CASES["small"], FEW).rglob("*.jpg"))
    for copy in range(20 if short else COPIES):
        (root / "many" / str(copy)).mkdir(parents=True)
        for number, file in enumerate(files):
            os.link(file, root / "many" / str(copy) / f"{number:04d}.jpg")

    def process(folder: Path) -> Work:
        more = {**TINY_VIT, "out": str(root / "one_step"), "overwrite": True, "steps": 1}
        words = [sys.executable, "-c", FIRST_STEP, repr((str(folder),)), repr(more)]
        return lambda: subprocess.run(words, check=True, capture_output=True)

    work = {"100 files": process(root / "few"), "100,000 files": process(root / "many")}
    return in_turns(work, repeats or (1 if short else 3))


PARTS = (*CASES, "waiting", "first_step")


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    for name in chosen(asked.only, dict.fromkeys(PARTS)):
        with tempfile.TemporaryDirectory() as folder:
            if name in CASES:
                rows = loading(name, Path(folder), asked.repeats, short=asked.short)
            else:
                measure = waiting if name == "waiting" else first_step
                rows = measure(Path(folder), asked.repeats, short=asked.short)
        keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
