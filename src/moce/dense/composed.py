"""Dense tasks from the embedded images: digits, clothes, or both, pasted on photographs.

All is drawn from a seed. Objects and photographs of the test images are those of the collections'
test splits. Masks are exact: an object's own pixels, as far as no later one covers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.compute
from PIL import Image
from scipy.ndimage import binary_fill_holes

from moce.data.decode import open_encoded, to_pixels
from moce.data.readers.parquet import demo_samples, demo_table
from moce.data.readers.sample import Sample
from moce.dense import rle
from moce.dense.mask_files import write_class_names, write_mask
from moce.dense.metrics import xywh
from moce.errors import MoceError
from moce.runs.files import atomic, make_folder, write_json

SceneTask = Literal["digits", "clothes", "kinds"]
SPLITS = {"train": "train", "val": "test"}  # our splits, and those of the embedded tasks
SEEDS = {"train": 0, "val": 1}
PIECE = 32  # pixels of an embedded image
MOST_OBJECTS = 4
SCALES = (0.5, 1.25)  # of a piece
MOST_COVERED = 0.2  # of an object placed before, by a new one
TRIES = 20
SOLID = 16  # gray value above which a pixel belongs to clothes
HALF = 0.5  # opacity from which a pixel belongs to an object


@dataclass(frozen=True)
class Scene:
    """pixels: [3, h, w] uint8; masks: [n, h, w] bool, without overlap; labels: [n] int64."""

    pixels: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


def write_scenes(
    out: Path | str,
    task: SceneTask,
    train: int = 400,
    val: int = 100,
    size: int = 64,
    seed: int = 0,
) -> list[str]:
    """Write images of size x size pixels with their truth; returns the classes.

    digits: as COCO, annotations/instances_{train,val}.json with packed masks beside train/ and val/.
    clothes: images/{train,val}/ and masks/{train,val}/ of PNG files and classes.txt; the class of
    the photograph is background. kinds: the same with both, as classes digit and clothes only,
    which a small network learns in a minute. Raises MoceError if the folder exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MoceError(f"{out} is not an empty folder; name a new one")
    classes = class_names(task)
    for split, count in (("train", train), ("val", val)):
        scenes = (compose(task, split, number, size, seed) for number in range(count))
        if task == "digits":
            _write_coco(out, split, scenes, classes)
        else:
            _write_masks(out, split, scenes, ["background", *classes])
    return classes if task == "digits" else ["background", *classes]


def _write_coco(out: Path, split: str, scenes: Iterator[Scene], classes: list[str]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        name = f"{number:05}.png"
        _write_image(out / split / name, scene.pixels)
        height, width = scene.pixels.shape[1:]
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        masks = rle.encode(scene.masks)
        for label, mask, box in zip(scene.labels, masks, rle.boxes(masks), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": xywh(box),
                    "area": float(rle.areas([mask])[0]),
                    "iscrowd": 0,
                    "segmentation": {**mask, "counts": mask["counts"].decode("ascii")},
                }
            )
    categories = [{"id": n, "name": name} for n, name in enumerate(classes, 1)]
    make_folder(out / "annotations")
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(out / "annotations" / f"instances_{split}.json", content)


def _write_masks(out: Path, split: str, scenes: Iterator[Scene], classes: list[str]) -> None:
    make_folder(out / "masks" / split)
    for number, scene in enumerate(scenes, 1):
        name = f"{number:05}.png"
        _write_image(out / "images" / split / name, scene.pixels)
        mask = np.zeros(scene.pixels.shape[1:], np.int64)
        for label, part in zip(scene.labels, scene.masks, strict=True):
            mask[part] = label + 1
        write_mask(out / "masks" / split / name, mask)
    write_class_names(out, classes)


def _write_image(path: Path, pixels: np.ndarray) -> None:
    make_folder(path.parent)
    with atomic(path) as temporary:
        Image.fromarray(pixels.transpose(1, 2, 0)).save(temporary, "PNG")


# --- composing ----------------------------------------------------------------------------------------


def compose(task: SceneTask, split: str, number: int, size: int = 64, seed: int = 0) -> Scene:
    """Image `number` of a split: a photograph with one to four objects, always the same."""
    rng = np.random.default_rng([seed, SEEDS[split], number])
    pieces, labels, solid = _pieces(task, split)
    scenes = photographs(split)
    picked = Image.fromarray(scenes[rng.integers(len(scenes))])
    canvas = np.asarray(picked.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)
    masks: list[np.ndarray] = []
    found: list[int] = []
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        row = int(rng.integers(len(pieces)))
        color = rng.uniform(0.3, 1.0, 3)  # of a light that the object stands in
        for _ in range(TRIES):
            placed = _placed(pieces[row], bool(solid[row]), size, rng)
            if placed is None:
                continue
            gray, opacity = placed
            own = opacity >= HALF
            if own.any() and all((own & mask).sum() <= MOST_COVERED * mask.sum() for mask in masks):
                masks = [mask & ~own for mask in masks] + [own]
                found.append(int(labels[row]))
                canvas += opacity[:, :, None] * (gray[:, :, None] * color - canvas)
                break
    pixels = canvas.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    return Scene(pixels, np.stack(masks), np.array(found, np.int64))


def _placed(
    piece: np.ndarray, solid: bool, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Gray values and opacity, each [size, size], of a piece at a random size and place within."""
    opacity = piece / 255.0
    if solid:
        opacity = binary_fill_holes(piece > SOLID).astype(np.float64)
    side = round(PIECE * rng.uniform(*SCALES))
    rows, columns = (np.flatnonzero(opacity.any(axis)) for axis in (1, 0))
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    extent = (corners[2] - corners[0], corners[3] - corners[1])
    scaled = tuple(max(2, round(side * each / PIECE)) for each in extent)
    if max(scaled) > size:
        return None
    x, y = (int(rng.integers(0, size - each + 1)) for each in scaled)
    whole = piece.astype(np.float64) if solid else np.full_like(opacity, 255.0)
    results = []
    for values in (whole, opacity):
        image = Image.fromarray(
            values[corners[1] : corners[3], corners[0] : corners[2]].astype(np.float32)
        )
        resized = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
        result = np.zeros((size, size))
        result[y : y + scaled[1], x : x + scaled[0]] = resized
        results.append(result)
    return results[0], results[1]


def class_names(task: SceneTask) -> list[str]:
    """The classes of the objects."""
    if task == "kinds":
        return ["digit", "clothes"]
    return sorted({str(sample.label) for sample in demo_samples(task)})


@cache
def _pieces(task: SceneTask, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objects of a split: [n, 32, 32] uint8 gray, light on black; [n] int64 classes; [n] bool.

    The last is True for objects with a surface: pixels within their outline belong to them.
    """
    if task == "kinds":
        parts = [_pieces(kind, split) for kind in ("digits", "clothes")]
        labels = np.repeat([0, 1], [len(part[0]) for part in parts])
        return np.concatenate([p[0] for p in parts]), labels, labels == 1
    samples = [sample for sample in demo_samples(task) if sample.split == SPLITS[split]]
    classes = class_names(task)
    labels = np.array([classes.index(str(s.label)) for s in samples], np.int64)
    return _gray(samples), labels, np.full(len(labels), task == "clothes")


def _gray(samples: list[Sample]) -> np.ndarray:
    return np.stack([to_pixels(sample.open(), (PIECE, PIECE), 1)[0] for sample in samples])


@cache
def photographs(split: str) -> np.ndarray:
    """[n, 32, 32, 3] uint8: photographs of CIFAR-10's train or test split."""
    table = demo_table()
    ids = table.column("id").cast(pyarrow.string())
    chosen = table.filter(pyarrow.compute.starts_with(ids, f"cifar10/{SPLITS[split]}/"))
    contents = chosen.column("image").to_pylist()
    pixels = [to_pixels(open_encoded(content), (PIECE, PIECE)) for content in contents]
    return np.stack(pixels).transpose(0, 2, 3, 1)
