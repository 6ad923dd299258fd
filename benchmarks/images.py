"""Speed of decoding, packing and loading images, compared with other loaders.

    python -m benchmarks.images            # some minutes; about 1 GB of memory
    python -m benchmarks.images --short    # fewer images and repeats
    python -m benchmarks.draw              # the tables of docs/performance.md from the results

Files are random crops of scikit-learn's two sample photographs: 500 x 400 JPEGs for training at
224, 32 x 32 PNGs for training at 32. Every candidate returns float32 batches after a random resized
crop (bicubic, antialiased, scale 0.2 to 1), a flip and normalization. They alternate in one process
tree; each row of results/images.json is one pass of one candidate. Needs: pip install 'moce[hf]'.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
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
from benchmarks.measure import FOLDER, machine
from moce.config import PretrainSettings
from moce.data import load
from moce.data.dataset import ImageDataset
from moce.data.decode import to_pixels
from moce.data.load import load_images
from moce.data.loader import BatchOrder, prefetched
from moce.models.encoder import EncoderSpec
from moce.runs.model import read_timings
from moce.training.objectives import augmented

RESULTS = FOLDER / "images.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("moce", "torch", "torchvision", "timm", "pillow", "numpy", "datasets")
Pass = Callable[[], int]  # reads every image once, returns their number


@dataclass(frozen=True)
class Case:
    """file: (height, width, suffix) of the files. size: of the model. packed: of the packed file."""

    name: str
    file: tuple[int, int, str]
    size: int
    packed: int
    images: int
    batch: int


CASES = (
    Case("224", (400, 500, ".jpg"), 224, 256, 384, 64),
    Case("32", (32, 32, ".png"), 32, 32, 4096, 256),
)


def write_files(folder: Path, case: Case) -> Path:
    """Random crops of two photographs, in one class folder each."""
    random = np.random.default_rng(0)
    height, width, suffix = case.file
    for label, photo in enumerate(load_sample_images().images):
        (folder / str(label)).mkdir(parents=True)
        for number in range(case.images // 2):
            top = random.integers(photo.shape[0] - height + 1)
            left = random.integers(photo.shape[1] - width + 1)
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            crop.save(folder / str(label) / f"{number:04d}{suffix}", quality=90)
    return folder


# --- decoding -----------------------------------------------------------------------------------------


def decode_in_threads(folder: Path, case: Case) -> Pass:
    return lambda: len(load_images(str(folder), (case.packed, case.packed)))


def _decode(job: tuple[str, int]) -> np.ndarray:
    with Image.open(job[0]) as image:
        return to_pixels(image, (job[1], job[1]))


def decode_in_processes(folder: Path, case: Case, pool: multiprocessing.pool.Pool) -> Pass:
    jobs = [(str(path), case.packed) for path in sorted(folder.rglob("*.*"))]
    return lambda: sum(1 for _ in pool.imap(_decode, jobs, chunksize=16))


def pack(folder: Path, case: Case) -> Pass:
    out = folder.parent / f"{case.name}.moce"
    return lambda: moce.pack(folder, size=case.packed, out=out, overwrite=True).images


def decode_with_torchvision(folder: Path, case: Case, workers: int) -> Pass:
    steps = [
        v2.Resize(case.packed, v2.InterpolationMode.BICUBIC),
        v2.CenterCrop(case.packed),
        v2.PILToTensor(),
    ]
    return passes(loader(ImageFolder(folder, v2.Compose(steps)), case, workers))


# --- batches ready for training -------------------------------------------------------------------------


def passes(batches: Iterable) -> Pass:
    return lambda: sum(len(pixels) for pixels, _ in batches)


def loader(data: object, case: Case, workers: int) -> DataLoader:
    return DataLoader(
        data,  # type: ignore[arg-type]
        case.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def transform(case: Case) -> v2.Compose:
    cut = v2.RandomResizedCrop(
        case.size, scale=(0.2, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([cut, v2.RandomHorizontalFlip(), *to_float])


def torchvision_batches(folder: Path, case: Case, workers: int) -> Pass:
    return passes(loader(ImageFolder(folder, transform(case)), case, workers))


class _Transform:
    """A class, because worker processes need to pickle it."""

    def __init__(self, case: Case) -> None:
        self._steps = transform(case)

    def __call__(self, rows: dict) -> dict:
        return {"image": [self._steps(image) for image in rows["image"]], "label": rows["label"]}


def huggingface_batches(folder: Path, case: Case, workers: int) -> Pass:
    import datasets

    paths = sorted(str(path) for path in folder.rglob("*.*"))
    labels = [int(Path(path).parent.name) for path in paths]
    table = datasets.Dataset.from_dict({"image": paths, "label": labels})
    table = table.cast_column("image", datasets.Image()).with_transform(_Transform(case))
    batches = loader(table, case, workers)
    return lambda: sum(len(batch["image"]) for batch in batches)


def packed_images(folder: Path, case: Case, *, mapped: bool) -> ImageDataset:
    file = folder.parent / f"{case.name}.moce"
    kept = load.MEMORY_SHARE
    try:
        load.MEMORY_SHARE = 0.0 if mapped else kept
        return load_images(str(file), (case.size, case.size))
    finally:
        load.MEMORY_SHARE = kept


def moce_batches(folder: Path, case: Case, *, mapped: bool) -> Pass:
    """One epoch of what precedes a training step's forward pass."""
    images = packed_images(folder, case, mapped=mapped)
    settings = PretrainSettings(data="x", out=Path("x"), batch_size=case.batch)
    spec, size = EncoderSpec("", mean=MEAN, std=STD), (case.size, case.size)
    order = BatchOrder(len(images), case.batch, seed=0)

    def one_pass() -> int:
        micro_batches = order.micro_batches(0, len(images) // case.batch, None)
        batches = prefetched(images, micro_batches, torch.device("cpu"))
        return sum(len(augmented(batch, settings, spec, size)) for batch in batches)

    return one_pass


# --- waiting ------------------------------------------------------------------------------------------


def training_wait(folder: Path, case: Case, steps: int) -> dict[str, float]:
    """Share of a step that a small ViT waits for data, by the timings of moce pretrain."""
    patch = case.size // 14 if case.size == 224 else 4
    arguments = {"patch_size": patch, "img_size": case.size, "embed_dim": 96, "depth": 4}
    out = folder.parent / f"run{case.name}"
    moce.pretrain(
        folder.parent / f"{case.name}.moce",
        out=out,
        model="vit_tiny_patch16_224",
        model_args=arguments,
        decoder_dim=64,
        decoder_depth=1,
        decoder_heads=2,
        steps=steps,
        batch_size=case.batch,
        log_every=1,
        device="cpu",
        precision="float32",
    )
    rows = read_timings(out)[1:]  # the first step waits for the first batch
    step, wait = (
        float(np.median([row[name] for row in rows])) for name in ("step_s", "data_wait_s")
    )
    return {"step_s": step, "data_wait_s": wait, "share": wait / step}


# --- the whole -----------------------------------------------------------------------------------------


def candidates(
    folder: Path, case: Case, pool: multiprocessing.pool.Pool
) -> dict[str, dict[str, Pass]]:
    """By measurement and name. Packs first, because the loaders read the packed file."""
    pack(folder, case)()
    loaders = {
        f"{name}, {workers} workers": make(folder, case, workers)
        for name, make in (("torchvision", torchvision_batches), ("datasets", huggingface_batches))
        for workers in (0, 2)
    }
    decoders = {
        "moce, threads": decode_in_threads(folder, case),
        "moce, 2 processes": decode_in_processes(folder, case, pool),
        "torchvision, 0 workers": decode_with_torchvision(folder, case, 0),
        "torchvision, 2 workers": decode_with_torchvision(folder, case, 2),
        "moce pack": pack(folder, case),
    }
    ours = {
        "moce, packed, in memory": moce_batches(folder, case, mapped=False),
        "moce, packed, mapped": moce_batches(folder, case, mapped=True),
    }
    return {"decode": decoders, "loader": {**ours, **loaders}}


def measure(runs: dict[str, Pass], repeats: int) -> list[dict]:
    """One warm-up pass each, then alternating passes."""
    for one_pass in runs.values():
        one_pass()
    rows = []
    for repeat in range(repeats):
        for name, one_pass in runs.items():
            start = time.perf_counter()
            count = one_pass()
            rate = count / (time.perf_counter() - start)
            rows.append({"candidate": name, "repeat": repeat, "images_per_s": round(rate, 1)})
            print(f"{name:28} {rate:10.0f} images/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer images, steps and repeats")
    parser.add_argument("--repeats", type=int, help="passes of each (default: 7; short: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    repeats, share, steps = (2, 4, 4) if options.short else (7, 1, 20)
    repeats = options.repeats or repeats
    result: dict = {"machine": machine(PACKAGES), "short": options.short, "cases": {}}
    with (
        tempfile.TemporaryDirectory() as root,
        multiprocessing.get_context("spawn").Pool(2) as pool,
    ):
        for full in CASES:
            case = Case(**{**vars(full), "images": full.images // share})
            folder = write_files(Path(root) / case.name, case)
            runs = candidates(folder, case, pool)
            rows = {what: measure(group, repeats) for what, group in runs.items()}
            wait = training_wait(folder, case, steps)
            result["cases"][case.name] = {"case": vars(case), "rows": rows, "training": wait}
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
