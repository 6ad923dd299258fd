"""Crops from originals against crops from images that were cut to the model's size before.

    python -m experiments.crops.run --cache DIR   # a quarter of an hour of one core
    python -m experiments.crops.run --cache DIR --short --out DIR/rows.jsonl   # a check, a minute

Both arms train the same small MAE on the same photographs (photographs.py) for as many steps, with
the same seeds. `originals` crops from images of 300 x 400 pixels. `precut` does what moce 0.1.0 did:
each image is first resized, bicubic, to a shorter side of SIDE pixels, its ends are cut off, and
crops are taken from what remains. Each row of results/rows.jsonl is one trained model and has

- the reconstruction loss of held-out images: of crops from their originals, and of crops from them pre-cut,
  each for parts of known photographs (`test`) and for unseen photographs (`unseen`);
- the accuracy, in %, of a logistic regression on frozen features that says which photograph a held-out part
  is from: seen whole, and seen in crops of a fifth of its area (`detail`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import moce
from experiments.crops.photographs import Tile, tiles
from moce.data.load import load_images
from moce.data.readers.sample import Encoded, Sample
from moce.data.views import Views
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.encoder import fit_of
from moce.runs.model import provenance
from moce.weights.from_runs import load_mae

RESULTS = Path(__file__).parent / "results" / "rows.jsonl"
SIDE, PATCH = 96, 8  # pixels
ARMS = ("originals", "precut")
CROPS = 4  # of each held-out image
DETAIL = 0.2  # share of the area
MODEL = {
    "model": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
    },
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 4,
}
TRAINING = {"batch_size": 64, "base_lr": 4e-3, "device": "cpu", "workers": 0, "threads": 1}


def precut(image: Image.Image) -> Image.Image:
    """As moce 0.1.0 stored images: the shorter side at SIDE, the ends of the longer one cut off."""
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    return image.crop((left, top, left + SIDE, top + SIDE))


def crops(image: Image.Image, path: Path, number: int, smallest: float, whole: bool) -> None:
    """Write CROPS random resized crops of an image; without `whole` all of the smallest area."""
    image.save(path.with_suffix(".bmp"))
    views = Views(seed=1, size=(SIDE, SIDE), smallest_crop=smallest, hflip=False)
    sample = Sample(path.name, Encoded(path.with_suffix(".bmp")))
    numbers = views.numbers(torch.full((CROPS,), number), torch.arange(CROPS))
    if not whole:  # the first number of each try is for the area
        numbers[:, 1::4] = 0.0
    for place, row in enumerate(numbers):
        pixels = views.of_sample(sample, row, 3)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path.parent / f"{path.name}-{place}.bmp")
    path.with_suffix(".bmp").unlink()


def write(found: list[Tile], root: Path) -> None:
    """The folders of both arms' training, of reconstruction and of the probes."""
    for number, tile in enumerate(found):
        cut = precut(tile.image)
        if tile.part == "train":
            save(tile.image, root / "train/originals" / f"{tile.name}.bmp")
            save(cut, root / "train/precut" / f"{tile.name}.bmp")
        else:
            for arm, image in (("originals", tile.image), ("precut", cut)):
                folder = root / "reconstruct" / f"{tile.part}_{arm}"
                folder.mkdir(parents=True, exist_ok=True)
                crops(image, folder / tile.name, number, DETAIL, whole=True)
        if tile.part != "unseen":
            own = Path(tile.part) / tile.photograph
            save(tile.image, root / "probe/whole" / own / f"{tile.name}.bmp")
            (root / "probe/detail" / own).mkdir(parents=True, exist_ok=True)
            crops(tile.image, root / "probe/detail" / own / tile.name, number, DETAIL, whole=False)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)  # BMP: decoding takes the least time


def one_run(root: Path, out: Path, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train an arm with a seed, and measure it."""
    start = time.process_time()
    moce.pretrain(root / "train" / arm, out=out, steps=steps, seed=seed, **MODEL, **TRAINING)
    seconds = time.process_time() - start
    spec, mae = load_mae(out)
    row: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps, "train_cpu_s": round(seconds)}
    for folder in sorted((root / "reconstruct").iterdir()):
        images = load_images(str(folder), fit_of(mae.encoder))
        row[f"loss_{folder.name}"] = round(reconstruction_error(mae, spec.encoder, images), 5)
    for kind in ("whole", "detail"):
        probed = moce.probe(out, root / "probe" / kind, solver="lbfgs", device="cpu", threads=1)
        row[f"probe_{kind}"] = round(100 * probed.mean, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for fetched packages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--short", action="store_true", help="one seed, few steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    seeds, steps = (1, 20) if options.short else (options.seeds, options.steps)
    options.cache.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        found = list(tiles(options.cache))
        write(found, root)
        counts = {part: sum(t.part == part for t in found) for part in ("train", "test", "unseen")}
        print(f"{len({t.photograph for t in found})} photographs, images: {counts}", flush=True)
        for seed in range(seeds):
            for arm in ARMS:
                row = one_run(root, root / f"run_{arm}_{seed}", arm, seed, steps)
                rows.append({**row, "images": counts, **provenance()})
                print(json.dumps(row), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text("".join(json.dumps(r) + "\n" for r in rows))


if __name__ == "__main__":
    main()
