"""How time and memory grow with the number of images: pretrain's start, clustering, selection, the report.

    python -m benchmarks.scaling                            # 10^4, 10^5 and 10^6 images: some minutes
    python -m benchmarks.scaling --only selection --sizes 1000000,10000000
    python -m benchmarks.draw                               # the tables of docs/performance.md

The code is that of the commands; images and features are simulated. Images of 72 x 72, too large to be
cached on opening, are an array in a sparse file. Features [n, 64] lie around 64 planted centers. Each
measurement has a process of its own, which has done the same for 500 images before. Memory is the peak
above what was there before, without the features. An exponent is the slope of a line through the
logarithms of all sizes.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn.functional import normalize

import moce
from benchmarks.measure import (
    FOLDER,
    MEGABYTE,
    Row,
    Work,
    chosen,
    high_water_bytes,
    in_child,
    keep,
    options,
    resident_bytes,
)
from benchmarks.selection import Case, bank_of
from moce.clustering.balanced_kmeans import balanced_kmeans
from moce.config.load import read_yaml
from moce.data.readers.factory import open_source
from moce.runs.assignments import write_assignments

RESULTS = FOLDER / "scaling.json"
PACKAGES = ("moce", "torch", "numpy", "pyarrow")
SIZES = "10000,100000,1000000"
SIDE, WIDTH, CLUSTERS, FEW = 72, 64, 64, 500
SMALL = {"patch_size": 4, "img_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
PRETRAIN = {
    "model": "vit_tiny_patch16_224", "model_args": SMALL, "decoder_dim": 16, "decoder_depth": 1,
    "decoder_heads": 2, "steps": 1, "batch_size": 16, "device": "cpu", "precision": "float32",
}  # fmt: skip


def images(folder: Path, count: int) -> str:
    """Black images in a sparse file of any size."""
    path = folder / f"{count}.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIDE, SIDE, 3))
    return str(path)


def features(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = normalize(torch.randn(CLUSTERS, WIDTH, generator=generator), dim=1)
    planted = torch.randint(CLUSTERS, (count,), generator=generator)
    made = torch.randn(count, WIDTH, generator=generator).mul_(0.1).add_(centers[planted])
    return made.div_(made.norm(dim=1, keepdim=True))


# --- what is measured: each is prepared for a number of images, and then called -------------------


def start(folder: Path, count: int) -> Work:
    """From the call to the end of the first step, with its checkpoint."""
    data = images(folder, count)
    return lambda: moce.pretrain(data, out=folder / "run", overwrite=True, **PRETRAIN)


def clustering(folder: Path, count: int) -> Work:
    made = features(count)
    return lambda: balanced_kmeans(made, CLUSTERS)


def selection(folder: Path, count: int) -> Work:
    """From features of a task's images to the choice; the forward pass is linear by nature."""
    bank, made = bank_of(Case("test", 0, CLUSTERS)), features(count)
    bank.clusters.centroids = features(CLUSTERS)

    def select() -> object:
        cluster, similarity = bank.clusters.assign(made)
        return bank.choose(cluster.bincount(minlength=CLUSTERS), similarity.mean().item(), "auto")

    return select


def report(folder: Path, count: int) -> Work:
    """The page of a clustering of so many images."""
    few, data = images(folder, FEW), images(folder, count)
    memory = np.load(few, mmap_mode="r+")
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.shape, dtype=np.uint8)
    quiet = {"device": "cpu", "precision": "float32", "overwrite": True}
    moce.pretrain(few, out=folder / "mae", overwrite=True, **PRETRAIN)
    run = moce.cluster(few, mae=folder / "mae", out=folder / "run", num_clusters=8, **quiet).run
    ids = [sample.id for sample in open_source(data)]
    write_assignments(run, ids, torch.arange(count) % 8)
    settings = read_yaml((run / "config.yaml").read_text()) | {"data": data}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return lambda: moce.report(run, out=folder / "report.html")


PARTS: dict[str, Callable[[Path, int], Work]] = {
    "start": start,
    "clustering": clustering,
    "selection": selection,
    "report": report,
}


def measured(part: str, count: int) -> Row:
    """Seconds and peak memory for `count` images; in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        first, place = Path(folder) / "first", Path(folder) / "place"
        for path in (first, place):
            path.mkdir()
        PARTS[part](first, FEW)()  # imports, threads, caches
        work = PARTS[part](place, count)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # high water starts anew (Linux)
        before, since = resident_bytes(), time.perf_counter()
        work()
        seconds = time.perf_counter() - since
        peak = (high_water_bytes() - before) / MEGABYTE
    return {"candidate": part, "images": count, "seconds": seconds, "peak_mb": max(peak, 0.0)}


def exponent(rows: list[Row], key: str) -> float:
    """The slope of log(key) over log(images), by least squares."""
    counts = np.log([row["images"] for row in rows])
    return float(np.polyfit(counts, np.log([max(row[key], 1e-6) for row in rows]), 1)[0])


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__ or "", PARTS, RESULTS)
    parser.add_argument("--sizes", default=SIZES, help="numbers of images, with commas between")
    asked = parser.parse_args(arguments)
    sizes = [int(size) for size in ("500,2000" if asked.short else asked.sizes).split(",")]
    for part in chosen(asked.only, PARTS):
        rows = []
        for count in sizes:
            repeats = [in_child(partial(measured, part, count)) for _ in range(asked.repeats or 1)]
            rows.append(min(repeats, key=lambda row: row["seconds"]))
            print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if len(rows) > 1:
            slopes = [f"{key} {exponent(rows, key):.2f}" for key in ("seconds", "peak_mb")]
            print(f"{part}: exponents {', '.join(slopes)}", flush=True)
        keep(asked.out, part, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
