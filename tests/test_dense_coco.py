"""COCO JSON: what the reader finds is what pycocotools finds, and bad entries are counted."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from dense_folders import HEIGHT, WIDTH, write_coco, write_image, write_json
from PIL import Image
from pycocotools.coco import COCO

from moce.data.decode import upright_size
from moce.dense import rle
from moce.dense.images import whole_pixels
from moce.dense.readers import read_dense
from moce.errors import MoceError

TRAIN = "annotations/instances_train2017.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


def edit(folder: Path, change) -> None:
    """Change the content of the training split's JSON."""
    content = json.loads((folder / TRAIN).read_text())
    change(content)
    write_json(folder / TRAIN, content)


def test_boxes_masks_and_crowds_are_those_of_pycocotools(folder: Path) -> None:
    source = read_dense(str(folder), None, None)
    assert (source.task, source.has_masks) == ("detect", True)
    assert (source.classes, source.category_ids) == (["cat", "dog", "owl"], [3, 17, 90])
    assert [sample.split for sample in source.samples] == ["train"] * 3 + ["val"] * 3
    assert source.skipped == source.clipped == []
    for split in ("train", "val"):
        official = COCO(folder / f"annotations/instances_{split}2017.json")
        for sample in (s for s in source.samples if s.split == split):
            sample = pickle.loads(pickle.dumps(sample))  # as worker processes get it
            expected = official.loadAnns(official.getAnnIds(sample.image_id))
            found = sample.target()
            assert sample.id == f"{split}2017/{sample.image_id:012}.jpg"
            assert sample.size == (HEIGHT, WIDTH) and len(found) == len(expected)
            names = [official.cats[each["category_id"]]["name"] for each in expected]
            assert [source.classes[label] for label in found.classes] == names
            assert found.crowd.tolist() == [each["iscrowd"] == 1 for each in expected]
            masks = rle.decode(found.masks, sample.size)
            for row, each in enumerate(expected):
                x, y, w, h = each["bbox"]
                np.testing.assert_allclose(found.boxes[row], [x, y, x + w, y + h], rtol=1e-6)
                np.testing.assert_array_equal(masks[row], official.annToMask(each))
                assert found.areas[row] == each["area"]


def test_an_image_without_objects_has_empty_arrays(folder: Path) -> None:
    found = read_dense(str(folder), None).samples[2].target()
    assert (found.boxes.shape, found.classes.shape, found.masks) == ((0, 4), (0,), ())
    assert found.crowd.shape == (0,)


def test_boxes_without_masks_are_read_as_boxes(folder: Path) -> None:
    def boxes_only(content) -> None:
        for each in content["annotations"]:
            del each["segmentation"]

    (folder / "annotations/instances_val2017.json").unlink()
    edit(folder, boxes_only)
    source = read_dense(str(folder), None)
    assert not source.has_masks and source.samples[0].target().masks is None


BAD = {
    "box outside the image": {"bbox": [WIDTH + 5, 2, 4, 4]},
    "box of no area": {"bbox": [3, 3, 0, 5]},
    "unknown class": {"category_id": 4},
    "not a box": {"bbox": [1, 2, float("nan"), 4]},
    "malformed annotation": {"bbox": ["a", 2, 3, 4]},
    "mask of another size": {"segmentation": {"size": [WIDTH, HEIGHT], "counts": "abc"}},
    "damaged mask": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "1000000"}},
    "damaged mask: run lengths": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 9]}},
    "not a polygon": {"segmentation": [[1, 2, 3, 4]]},
    "no mask": {"segmentation": []},
    "not an area": {"area": -4},
    "of an image that is not listed": {"image_id": 7},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_annotation_is_skipped_and_listed(folder: Path, reason: str, capsys) -> None:
    edit(folder, lambda content: content["annotations"][1].update(BAD[reason]))
    source = read_dense(str(folder), None)
    assert len(source.skipped) == 1 and len(source.samples) == 6
    name, why = source.skipped[0]
    assert why.startswith(reason.split(":")[0]) and ("object 2" in name or "annotation 2" in name)
    assert len(source.samples[0].target()) == 3
    assert f"skipped 1 of 16 annotations: 1 x {reason.split(':')[0]}" in capsys.readouterr().err


def test_too_many_bad_annotations_are_refused(folder: Path) -> None:
    def spoil(content) -> None:
        for each in content["annotations"][:4]:
            each["bbox"] = [0, 0, 0, 0]

    edit(folder, spoil)
    assert len(read_dense(str(folder), None, max_skipped=0.25).skipped) == 4
    with pytest.raises(MoceError, match=r"4 of the 16 annotations .* box of no area .*max-skipped"):
        read_dense(str(folder), None, max_skipped=0.24)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "missing file"),
        (lambda path: path.write_bytes(b"no image"), "ValueError: not an image"),
        (lambda path: write_image(path, HEIGHT, WIDTH), "image of another size: annotated as 40 x 30"),
    ],
)  # fmt: skip
def test_a_bad_image_is_skipped_and_listed(folder: Path, spoil, reason: str) -> None:
    spoil(folder / "train2017/000000000101.jpg")
    source = read_dense(str(folder), None)
    assert [sample.image_id for sample in source.samples] == [100, 102, 200, 201, 202]
    (skipped,) = source.skipped
    assert skipped[0] == "train2017/000000000101.jpg" and skipped[1].startswith(reason)
    with pytest.raises(MoceError, match="1 of the 6 images"):
        read_dense(str(folder), None, max_skipped=0.1)


def test_boxes_refer_to_the_upright_image(folder: Path) -> None:
    """A photograph stored lying, with an EXIF orientation: its annotations are those of the upright one."""
    path = folder / "train2017/000000000100.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    write_image(path, HEIGHT, WIDTH, exif=turned)
    sample = read_dense(str(folder), None).samples[0]
    assert sample.size == upright_size(sample.open()) == (HEIGHT, WIDTH)
    assert whole_pixels(sample.open()).shape == (3, HEIGHT, WIDTH)


def test_a_box_across_the_edge_is_cut_and_listed(folder: Path, capsys) -> None:
    def move(content) -> None:
        content["annotations"][0]["bbox"] = [-6, -4, 20, 10]
        content["annotations"][1]["bbox"] = [-0.5, 2, 20, 10]  # by rounding, as some of COCO's

    edit(folder, move)
    source = read_dense(str(folder), None)
    assert source.clipped == ["train2017/000000000100.jpg, object 1"]
    assert source.samples[0].target().boxes[:2].tolist() == [[0, 0, 14, 6], [-0.5, 2, 19.5, 12]]
    assert "1 boxes reach beyond their image and are cut" in capsys.readouterr().err


def test_a_split_whose_images_were_not_downloaded_is_left_out(folder: Path, capsys) -> None:
    (folder / "train2017").rename(folder / "elsewhere")
    source = read_dense(str(folder), None)
    assert {sample.split for sample in source.samples} == {"val"}
    assert "no folder" in capsys.readouterr().err


def test_annotations_beside_the_images_of_every_split(folder: Path) -> None:
    root = folder / "export"
    for split, name in (("train", "train2017"), ("valid", "val2017")):
        (root / split).parent.mkdir(exist_ok=True)
        (folder / name).rename(root / split)
        (folder / f"annotations/instances_{name}.json").rename(
            root / split / "_annotations.coco.json"
        )
    source = read_dense(str(root), None)
    assert [sample.split for sample in source.samples] == ["train"] * 3 + ["val"] * 3
    assert source.samples[0].id == "train/000000000100.jpg"


def test_an_annotation_file_of_its_own(folder: Path, tmp_path: Path) -> None:
    labels = (folder / TRAIN).rename(tmp_path / "labels.json")
    source = read_dense(str(folder / "train2017"), None, labels)
    assert [sample.id for sample in source.samples] == [
        f"000000000{n}.jpg" for n in (100, 101, 102)
    ]
    assert {sample.split for sample in source.samples} == {None}


REFUSED = {
    "cannot read": lambda content: "{",
    "is not COCO JSON": lambda content: [],
    "must hold the lists": lambda content: {"images": []},
    "every category needs": lambda content: {**content, "categories": [{"id": 1}]},
    "category 3 is": lambda content: {**content, "categories": [{"id": 3, "name": "eel"}]},
    "two categories are named eel": lambda content: {
        **content, "categories": [{"id": 5, "name": "eel"}, {"id": 6, "name": "eel"}]
    },
    "annotations must be a list": lambda content: {**content, "annotations": {}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_malformed_json_is_refused(folder: Path, message: str) -> None:
    path = folder / "annotations/instances_val2017.json"
    content = REFUSED[message](json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(MoceError, match=message):
        read_dense(str(folder), None)


def test_hidden_files_of_other_systems_are_left_out(folder: Path) -> None:
    for path in list(folder.rglob("*.*")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    source = read_dense(str(folder), None)
    assert source.skipped == [] and len(source.samples) == 6


def test_without_the_library_nothing_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metric would be missed only after training."""
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MoceError, match=r"pip install 'moce\[dense\]'"):
        read_dense(str(folder), None)


def test_images_that_are_no_entries_or_listed_twice(folder: Path) -> None:
    def spoil(content) -> None:
        content["images"] += [content["images"][0], {"id": 1}, "image"]

    edit(folder, spoil)
    source = read_dense(str(folder), None)
    assert [why.split(":")[0] for _, why in source.skipped] == ["listed twice"] + 2 * [
        "not an image"
    ]
    assert len(source.samples) == 6
