"""Composed tasks, files of predictions, and pictures: what is written is what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dense_folders import HEIGHT, WIDTH, disc
from PIL import Image
from pycocotools.coco import COCO

from moce.dense import rle
from moce.dense.composed import compose, write_scenes
from moce.dense.pictures import class_colors, draw_instances, draw_mask, side_by_side
from moce.dense.predictions import write_class_names, write_coco, write_mask
from moce.dense.readers import read_dense
from moce.dense.types import IGNORE, Instances
from moce.errors import MoceError

PIXELS = np.full((3, HEIGHT, WIDTH), 200, np.uint8)
MASKS = np.stack([disc(10, 10, 6), disc(28, 18, 5)])
CLASSES = ["a", "b"]


def prediction() -> dict:
    masks = rle.encode(MASKS)
    return {"boxes": rle.boxes(masks), "scores": [0.9, 0.2], "labels": [1, 0], "masks": masks}


def test_scenes_of_digits_are_read_back_as_they_were_composed(tmp_path: Path) -> None:
    classes = write_scenes(tmp_path / "x", "digits", train=4, val=3)
    source = read_dense(str(tmp_path / "x"), None)
    assert source.classes == classes == [str(digit) for digit in range(10)]
    assert source.has_masks and source.skipped == source.clipped == []
    assert [sample.split for sample in source.samples] == ["train"] * 4 + ["val"] * 3
    for sample, (split, number) in zip(
        source.samples,
        [("train", n) for n in range(4)] + [("val", n) for n in range(3)],
        strict=True,
    ):
        scene, found = compose("digits", split, number), sample.target()
        np.testing.assert_array_equal(np.asarray(sample.open()).transpose(2, 0, 1), scene.pixels)
        np.testing.assert_array_equal(rle.decode(found.masks, sample.size), scene.masks)
        np.testing.assert_array_equal(found.classes, scene.labels)
        assert 1 <= len(scene.labels) <= 4 and (scene.masks.sum(0) <= 1).all()


def test_scenes_of_clothes_are_read_back_as_they_were_composed(tmp_path: Path) -> None:
    classes = write_scenes(tmp_path, "clothes", train=2, val=2, size=48)
    source = read_dense(str(tmp_path), None)
    assert source.classes == classes and classes[0] == "background" and len(classes) == 11
    for sample, split in zip(source.samples, ["train", "train", "val", "val"], strict=True):
        scene, mask = compose("clothes", split, int(sample.id[-5]) - 1, size=48), sample.target()
        assert sample.split == split and mask.shape == (48, 48)
        for label, part in zip(scene.labels, scene.masks, strict=True):
            assert (mask[part] == label + 1).all()
        assert (mask[~scene.masks.any(0)] == 0).all()


def test_scenes_differ_by_split_number_and_seed_only(tmp_path: Path) -> None:
    first = compose("digits", "train", 0)
    np.testing.assert_array_equal(first.pixels, compose("digits", "train", 0).pixels)
    for other in (("val", 0, 0), ("train", 1, 0), ("train", 0, 1)):
        split, number, seed = other
        assert (compose("digits", split, number, seed=seed).pixels != first.pixels).any()
    (tmp_path / "file").touch()
    with pytest.raises(MoceError, match="not an empty folder"):
        write_scenes(tmp_path, "digits")


def test_predicted_objects_are_coco_json_that_other_tools_read(tmp_path: Path) -> None:
    path = tmp_path / "annotations" / "instances_val.json"
    path.parent.mkdir()
    predicted = [("x.png", None, (HEIGHT, WIDTH), prediction())]
    write_coco(path, predicted, CLASSES, [7, 9])
    truth = COCO(path)
    (mask, other), results = MASKS, json.loads(path.read_text())["annotations"]
    assert [(each["category_id"], each["score"]) for each in results] == [(9, 0.9), (7, 0.2)]
    np.testing.assert_array_equal(truth.annToMask(truth.anns[1]), mask)
    assert truth.anns[2]["area"] == other.sum()
    assert len(truth.loadRes(results).anns) == 2
    (tmp_path / "val").mkdir()
    Image.fromarray(PIXELS.transpose(1, 2, 0)).save(tmp_path / "val" / "x.png")
    source = read_dense(str(tmp_path), None)
    np.testing.assert_allclose(source.samples[0].target().boxes, prediction()["boxes"])
    assert source.category_ids == [7, 9]


def test_predicted_masks_are_read_back_as_labels(tmp_path: Path) -> None:
    mask = np.where(MASKS[0], 1, 0)
    mask[0, 0] = IGNORE
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(PIXELS.transpose(1, 2, 0)).save(tmp_path / "images" / "x.png")
    write_mask(tmp_path / "masks" / "x.png", mask, len(CLASSES))
    write_class_names(tmp_path / "classes.txt", CLASSES)
    source = read_dense(str(tmp_path), None)
    assert source.classes == CLASSES
    np.testing.assert_array_equal(source.samples[0].target(), mask)
    with Image.open(tmp_path / "masks" / "x.png") as image:
        assert image.convert("RGB").getpixel((10, 10)) == class_colors(2)[1]


def test_pictures_of_objects_show_those_with_enough_score() -> None:
    """A picture is the image itself but for what is drawn; small ones are enlarged."""
    scale = 256 // WIDTH
    none = draw_instances(PIXELS, {**prediction(), "scores": [0.1, 0.2]}, CLASSES)
    assert none.size == (WIDTH * scale, HEIGHT * scale) and none.getextrema() == ((200, 200),) * 3
    one = np.asarray(draw_instances(PIXELS, prediction(), CLASSES))
    changed = (one != 200).any(2)
    assert changed[10 * scale, 10 * scale] and not changed[18 * scale, 28 * scale]
    truth = Instances(prediction()["boxes"], np.array([1, 0]), None, np.zeros(2, bool))
    boxes = (np.asarray(draw_instances(PIXELS, truth, CLASSES)) != 200).any(2)
    assert boxes.any() and not boxes[18 * scale, 28 * scale]  # without masks, only an outline


def test_pictures_of_masks_leave_pixels_that_do_not_count() -> None:
    mask = np.full((HEIGHT, WIDTH), IGNORE)
    assert draw_mask(PIXELS[:1], mask, CLASSES).getextrema() == ((200, 200),) * 3
    mask[:, : WIDTH // 2] = 1
    drawn = draw_mask(PIXELS[:1], mask, CLASSES)
    expected = tuple(round((200 + value) / 2) for value in class_colors(2)[1])
    assert drawn.getpixel((3, 3)) == pytest.approx(expected, abs=1)
    assert drawn.getpixel((drawn.width - 3, 3)) == (200, 200, 200)
    row = side_by_side([drawn, drawn])
    assert row.size == (2 * drawn.width + 8, drawn.height + 14)
    assert row.crop((drawn.width + 8, 14, row.width, row.height)).tobytes() == drawn.tobytes()
