"""Semantic masks: ADE20K's, VOC's, Cityscapes' and plain folders; every value means what it should."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from dense_folders import HEIGHT, WIDTH, class_values, write_image, write_mask
from PIL import Image

from moce.dense.readers import read_dense, task_of
from moce.dense.types import IGNORE
from moce.errors import MoceError


def targets(source) -> dict[str, np.ndarray]:
    return {sample.id: pickle.loads(pickle.dumps(sample)).target() for sample in source.samples}


def plain(root: Path, values=(0, 1, 2), classes: str | None = "sky\nsea\nsand\n", **kinds) -> Path:
    """images/{train,val}/ beside masks/{train,val}/."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            write_image(root / "images" / split / f"{name}.jpg")
            mask = class_values(len(split), values)
            write_mask(root / "masks" / split / f"{name}.png", mask, **kinds)
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize("palette", [False, True])
def test_a_plain_folder_gray_or_with_a_palette(tmp_path: Path, palette: bool) -> None:
    root = plain(tmp_path, (0, 1, 2, IGNORE), palette=palette)
    source = read_dense(str(root), None)
    assert (source.task, source.classes) == ("segment", ["sky", "sea", "sand"])
    assert [(s.id, s.split) for s in source.samples] == [
        (f"images/{split}/{name}.jpg", split) for split in ("train", "val") for name in "ab"
    ]
    for name, mask in targets(source).items():
        assert mask.dtype == np.int64 and mask.shape == (HEIGHT, WIDTH)
        np.testing.assert_array_equal(
            mask, class_values(5 if "train" in name else 3, (0, 1, 2, IGNORE))
        )


def test_splits_first_and_classes_without_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_image(tmp_path / split / "images" / "a.png")
        write_mask(tmp_path / split / "labels" / "a.png", class_values(1, (0, 4)))
    source = read_dense(str(tmp_path), None)
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert {sample.split for sample in source.samples} == {"train", "test"}


def test_a_further_value_can_be_ignored(tmp_path: Path) -> None:
    root = plain(tmp_path, (0, 1, 9))
    with pytest.raises(MoceError, match=r"4 of the 4 images .* unknown class .*value 9"):
        read_dense(str(root), None)
    mask = next(iter(targets(read_dense(str(root), None, ignore_index=9)).values()))
    assert set(np.unique(mask)) == {0, 1, IGNORE}
    with pytest.raises(MoceError, match="not a value of a mask"):
        read_dense(str(root), None, ignore_index=300)


def test_ade20k_as_downloaded(tmp_path: Path) -> None:
    """Zero is any other object, which does not count; class 1 of the file is our class 0."""
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [
        f"{n}\t0.1\t9\t9\t0\t{name}"
        for n, name in enumerate(["wall", "screen, crt", "screen, crt"], 1)
    ]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    values = class_values(2, (0, 1, 2, 3))
    for split in ("training", "validation"):
        name = f"ADE_{split[:5]}_00000001"
        write_image(tmp_path / "images" / split / f"{name}.jpg")
        write_mask(tmp_path / "annotations" / split / f"{name}.png", values)
    source = read_dense(str(tmp_path), None)
    assert source.classes == ["wall", "screen, crt", "screen, crt #3"]
    assert [sample.split for sample in source.samples] == ["train", "val"]
    for mask in targets(source).values():
        np.testing.assert_array_equal(mask, np.where(values == 0, IGNORE, values - 1))


def test_voc_as_downloaded(tmp_path: Path) -> None:
    """Only the listed images; others have boxes only."""
    for name in ("2007_000032", "2007_000039", "2007_000063", "2007_000001"):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        write_mask(
            tmp_path / "SegmentationClass" / f"{name}.png",
            class_values(4, (0, 20, 255)),
            palette=True,
        )
        write_mask(
            tmp_path / "SegmentationObject" / f"{name}.png",
            class_values(4, (0, 1, 2)),
            palette=True,
        )
    sets = tmp_path / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("2007_000032\n")
    (sets / "val.txt").write_text("2007_000039\n2007_000999\n")
    (sets / "trainval.txt").write_text("2007_000032\n2007_000039\n")
    source = read_dense(str(tmp_path), None)
    assert len(source.classes) == 21 and source.classes[20] == "tvmonitor"
    assert [(s.id, s.split) for s in source.samples] == [
        ("JPEGImages/2007_000032.jpg", "train"), ("JPEGImages/2007_000039.jpg", "val")
    ]  # fmt: skip
    assert [name for name, _ in source.skipped] == ["2007_000999"]
    assert set(np.unique(targets(source)["JPEGImages/2007_000039.jpg"])) == {0, 20, IGNORE}


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_as_downloaded(tmp_path: Path, kind: str) -> None:
    values = (7, 26, 33, 4, 0) if kind == "labelIds" else (0, 13, 18, 255)
    raw = class_values(6, values)
    for split, city in (("train", "aachen"), ("val", "lindau")):
        name = f"{city}_000000_000019"
        write_image(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        write_mask(tmp_path / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", raw)
        write_mask(tmp_path / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", raw)
    source = read_dense(str(tmp_path), None)
    assert [sample.split for sample in source.samples] == ["train", "val"]
    assert (source.classes[0], source.classes[13], source.classes[18]) == ("road", "car", "bicycle")
    meaning = {7: 0, 26: 13, 33: 18, 4: IGNORE} if kind == "labelIds" else {0: 0, 13: 13, 18: 18}
    mask = targets(source)["leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"]
    for value, label in meaning.items():
        assert (raw == value).any() and (mask[raw == value] == label).all()


def rgb_mask(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (HEIGHT, WIDTH, 3), np.uint8)).save(
        path
    )


BAD = {
    "missing file: no mask": lambda root: (root / "masks/train/a.png").unlink(),
    "missing file: no image": lambda root: (root / "images/train/a.jpg").unlink(),
    "mask of another size": lambda root: write_mask(
        root / "masks/train/a.png", np.zeros((WIDTH, HEIGHT))
    ),
    "unknown class: value 3": lambda root: write_mask(
        root / "masks/train/a.png", class_values(0, (0, 3))
    ),
    "nothing labeled": lambda root: write_mask(root / "masks/train/a.png", class_values(0, (255,))),
    "ValueError: a mask in color": lambda root: rgb_mask(root / "masks/train/a.png"),
    "ValueError: not an image": lambda root: (root / "images/train/a.jpg").write_bytes(b"no"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_pair_is_skipped_and_listed(tmp_path: Path, reason: str, capsys) -> None:
    BAD[reason](plain(tmp_path))
    source = read_dense(str(tmp_path), None)
    ((name, why),) = source.skipped
    assert why.startswith(reason) and "train/a" in name and len(source.samples) == 3
    assert "skipped 1 of 4 images" in capsys.readouterr().err
    with pytest.raises(MoceError, match="1 of the 4 images"):
        read_dense(str(tmp_path), None, max_skipped=0.2)


def test_a_further_folder_and_hidden_files(tmp_path: Path, capsys) -> None:
    """Folders beside those of splits are no classes here; what is left out is said once."""
    root = plain(tmp_path)
    write_image(root / "images/extra/c.jpg")
    write_mask(root / "masks/extra/c.png", class_values(1, (0, 1)))
    (root / "images/train/._a.jpg").write_bytes(b"x")
    assert task_of(str(root)) == "segment"
    source = read_dense(str(root), None)
    assert [sample.split for sample in source.samples] == [None, "train", "train", "val", "val"]
    assert capsys.readouterr().err.count("left out: 1 hidden") == 1


def test_gray_saved_as_color_is_read(tmp_path: Path) -> None:
    path = plain(tmp_path) / "masks/train/a.png"
    with Image.open(path) as mask:
        mask.convert("RGB").save(path)
    found = targets(read_dense(str(tmp_path), None))
    np.testing.assert_array_equal(found["images/train/a.jpg"], class_values(5, (0, 1, 2)))


def test_masks_of_zero_and_255_are_refused(tmp_path: Path) -> None:
    """255 does not count: all of the foreground would be left out without a word."""
    with pytest.raises(MoceError, match="save the classes as 0, 1, 2"):
        read_dense(str(plain(tmp_path, (0, 255), None)), None)


def test_masks_somewhere_else(tmp_path: Path) -> None:
    root = plain(tmp_path / "data")
    elsewhere = (root / "masks/train").rename(tmp_path / "elsewhere")
    source = read_dense(str(root / "images/train"), "segment", elsewhere)
    assert [sample.id for sample in source.samples] == ["a.jpg", "b.jpg"]


def test_the_task_follows_from_the_labels(tmp_path: Path) -> None:
    assert task_of(str(plain(tmp_path / "a"))) == "segment"
    write_image(tmp_path / "b/cats/1.jpg")
    write_image(tmp_path / "b/masks/1.png")  # a class of that name
    assert task_of(str(tmp_path / "b")) == "classify"
    assert task_of("demo:digits") == "classify"
    with pytest.raises(MoceError, match="no boxes in"):
        read_dense(str(tmp_path / "a"), "detect")
    with pytest.raises(MoceError, match="no boxes or masks in"):
        read_dense(str(tmp_path / "b"), None)
    with pytest.raises(MoceError, match="no such annotations"):
        read_dense(str(tmp_path / "a"), None, tmp_path / "c")
