"""Composed tasks, files of masks, and pictures: what is written is what is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dense_folders import HEIGHT, WIDTH, disc
from PIL import Image

from moce.dense import rle
from moce.dense.composed import SceneTask, compose, write_scenes
from moce.dense.mask_files import write_class_names, write_mask
from moce.dense.pictures import COLORS, draw_instances, draw_mask, side_by_side
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


@pytest.mark.parametrize(("task", "count"), [("clothes", 11), ("kinds", 3)])
def test_scenes_of_clothes_are_read_back_as_they_were_composed(
    tmp_path: Path, task: SceneTask, count: int
) -> None:
    classes = write_scenes(tmp_path, task, train=2, val=2, size=48)
    source = read_dense(str(tmp_path), None)
    assert source.classes == classes and classes[0] == "background" and len(classes) == count
    for sample, split in zip(source.samples, ["train", "train", "val", "val"], strict=True):
        scene, mask = compose(task, split, int(sample.id[-5]) - 1, size=48), sample.target()
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


def test_predicted_masks_are_read_back_as_labels(tmp_path: Path) -> None:
    mask = np.where(MASKS[0], 1, 0)
    mask[0, 0] = IGNORE
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(PIXELS.transpose(1, 2, 0)).save(tmp_path / "images" / "x.png")
    write_mask(tmp_path / "masks" / "x.png", mask)
    write_class_names(tmp_path, CLASSES)
    source = read_dense(str(tmp_path), None)
    assert source.classes == CLASSES
    np.testing.assert_array_equal(source.samples[0].target(), mask)
    with Image.open(tmp_path / "masks" / "x.png") as image:
        assert image.convert("RGB").getpixel((10, 10)) == COLORS[1]


def test_pictures_of_objects_are_the_image_but_for_what_is_drawn() -> None:
    found = prediction()
    scale = round(320 / WIDTH)  # small images are enlarged
    for shown in ({**found, "boxes": found["boxes"][:0]}, found):
        picture = np.asarray(draw_instances(PIXELS[:1], shown, CLASSES))
        assert picture.shape == (HEIGHT * scale, WIDTH * scale, 3)
        changed = (picture != 200).any(2)
        inside = changed[10 * scale, 10 * scale] and changed[18 * scale, 28 * scale]
        assert inside == bool(len(shown["boxes"])) and not changed[-1, 0]
    truth = Instances(found["boxes"], np.array([1, 0]), None, np.zeros(2, bool))
    boxes = (np.asarray(draw_instances(PIXELS, truth, CLASSES)) != 200).any(2)
    assert boxes.any() and not boxes[18 * scale, 28 * scale]  # without masks, only an outline


def test_pictures_of_masks_leave_pixels_that_do_not_count() -> None:
    mask = np.full((HEIGHT, WIDTH), IGNORE)
    assert draw_mask(PIXELS[:1], mask, CLASSES).getextrema() == ((200, 200),) * 3
    mask[:, : WIDTH // 2] = 1
    drawn = draw_mask(PIXELS[:1], mask, CLASSES)
    expected = [round(0.4 * 200 + 0.6 * value) for value in COLORS[1]]
    assert drawn.getpixel((3, 3)) == pytest.approx(expected, abs=1)
    assert drawn.getpixel((drawn.width - 3, 3)) == (200, 200, 200)
    for name, is_drawn in (("background", False), ("0", False), ("wall", True)):
        picture = draw_mask(PIXELS, np.zeros((HEIGHT, WIDTH)), [name, "b"])
        assert (picture.getpixel((3, 3)) != (200, 200, 200)) == is_drawn
    rows = side_by_side([[drawn, drawn], [drawn, drawn]], gap=4)
    assert rows.size == (2 * drawn.width + 4, 2 * drawn.height + 4)
    corner = (drawn.width + 4, drawn.height + 4, rows.width, rows.height)
    assert rows.crop(corner).tobytes() == drawn.tobytes()
