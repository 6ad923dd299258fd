"""Small folders of detection and segmentation data, in the formats that tools really write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as official

WIDTH, HEIGHT = 40, 30
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 90, "name": "owl"}]


def write_image(path: Path, width: int = WIDTH, height: int = HEIGHT, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def disc(x: float, y: float, radius: float, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[h, w] bool."""
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: columns first, zeros first."""
    flat = mask.flatten(order="F").astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends, len(flat)]).tolist()
    return lengths if flat[0] == 0 else [0, *lengths]


def packed(mask: np.ndarray) -> dict[str, Any]:
    found = official.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def coco_objects(image_id: int, first: int, seed: int) -> list[dict[str, Any]]:
    """A polygon, two polygons, a packed mask, and a crowd with a list of run lengths."""
    rng = np.random.default_rng(seed)
    objects = []
    for kind in range(4):
        x, y = rng.uniform(10, 30), rng.uniform(8, 22)
        w, h = rng.uniform(5, 12), rng.uniform(4, 9)
        square = [
            x - w / 2,
            y - h / 2,
            x + w / 2,
            y - h / 2,
            x + w / 2,
            y + h / 2,
            x - w / 2,
            y + h / 2,
        ]
        triangle = [1.0, 1.0, 6.5, 1.0, 1.0, 7.25]
        mask = disc(x, y, h / 2)
        segmentation: Any = [square] if kind == 0 else [square, triangle]
        if kind >= 2:
            counts = {"size": list(mask.shape), "counts": run_lengths(mask)}
            segmentation = packed(mask) if kind == 2 else counts
        rle = segmentation
        if isinstance(rle, list):
            rle = official.merge(official.frPyObjects(rle, HEIGHT, WIDTH))
        elif isinstance(rle["counts"], list):
            rle = official.frPyObjects(rle, HEIGHT, WIDTH)
        category = CATEGORIES[int(rng.integers(2))]["id"]
        objects.append(
            {
                "id": first + kind,
                "image_id": image_id,
                "category_id": category,
                "bbox": [float(v) for v in official.toBbox(rle)],
                "segmentation": segmentation,
                "area": float(official.area(rle)) + 0.5,
                "iscrowd": int(kind == 3),
            }
        )
    return objects


def write_coco(
    root: Path, splits: Sequence[str] = ("train2017", "val2017"), count: int = 3
) -> Path:
    """COCO's folders as downloaded; the last image of every split has no objects."""
    for number, split in enumerate(splits):
        images, annotations = [], []
        for place in range(count):
            image_id = 100 * (number + 1) + place
            name = f"{image_id:012}.jpg"
            write_image(root / split / name)
            images.append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
            if place < count - 1:
                annotations += coco_objects(image_id, 10 * image_id, image_id)
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        write_json(
            root / "annotations" / f"instances_{split}.json", {**content, "categories": CATEGORIES}
        )
    return root


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_mask(path: Path, values: np.ndarray, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image.putpalette([7 * n % 256 for n in range(768)])
    image.save(path)
    return path


def class_values(seed: int, values: Sequence[int]) -> np.ndarray:
    """[h, w]: blocks of the given values."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.choice(values, (HEIGHT // 5, WIDTH // 5)), np.ones((5, 5), int))
