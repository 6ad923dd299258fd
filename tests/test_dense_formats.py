"""YOLO's text, VOC's XML, parquet and Hugging Face data sets: the same boxes from every format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from dense_folders import HEIGHT, WIDTH, class_values, write_image, write_mask
from PIL import Image, ImageDraw

from moce.dense import rle
from moce.dense.readers import read_dense, task_of
from moce.errors import MoceError

datasets = pytest.importorskip("datasets")

# Class, and x1, y1, x2, y2, of the objects of two images.
OBJECTS = {"a": [("cat", (4, 3, 20, 15)), ("dog", (10, 8, 40, 30))], "b": [("dog", (0, 0, 8, 6))]}
CLASSES = ["cat", "dog"]


def check(source, ids: list[str]) -> None:
    """The source holds the objects above."""
    assert (source.task, source.classes, source.skipped) == ("detect", CLASSES, [])
    assert [sample.id for sample in source.samples] == ids
    for sample, objects in zip(source.samples, OBJECTS.values(), strict=True):
        found = sample.target()
        assert sample.size == (HEIGHT, WIDTH)
        assert [source.classes[label] for label in found.classes] == [name for name, _ in objects]
        np.testing.assert_allclose(found.boxes, [box for _, box in objects], atol=1e-4)


def object_numbers(name: str) -> np.ndarray:
    """[h, w]: 1 in the first object of an image, 2 in the second; later ones cover earlier ones."""
    values = np.zeros((HEIGHT, WIDTH), np.int64)
    for number, (_, (x1, y1, x2, y2)) in enumerate(OBJECTS[name], 1):
        values[y1:y2, x1:x2] = number
    return values


def check_masks(source) -> None:
    """The objects have the masks above."""
    assert source.has_masks and not source.skipped
    for name, sample in zip(OBJECTS, source.samples, strict=True):
        found = rle.decode(sample.target().masks, (HEIGHT, WIDTH))
        for number, mask in enumerate(found, 1):
            np.testing.assert_array_equal(mask, object_numbers(name) == number)


# --- YOLO ---------------------------------------------------------------------------------------------


def yolo_line(name: str, box) -> str:
    x1, y1, x2, y2 = box
    numbers = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
    return " ".join([str(CLASSES.index(name)), *(f"{number:.8f}" for number in numbers)])


DATA_YAML = "path: ../elsewhere\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"


def write_yolo(root: Path, config: str | None = DATA_YAML) -> Path:
    for (name, objects), split in zip(OBJECTS.items(), ("train", "val"), strict=True):
        write_image(root / "images" / split / f"{name}.jpg")
        labels = root / "labels" / split / f"{name}.txt"
        labels.parent.mkdir(parents=True)
        labels.write_text("\n".join(yolo_line(*each) for each in objects) + "\n")
    if config is not None:
        (root / "data.yaml").write_text(config)
    return root


def test_yolo_boxes(tmp_path: Path) -> None:
    root = write_yolo(tmp_path)
    ids = ["images/train/a.jpg", "images/val/b.jpg"]
    for data in (root, root / "data.yaml"):
        source = read_dense(str(data), None)
        check(source, ids)
        assert [s.split for s in source.samples] == ["train", "val"] and not source.has_masks


def test_yolo_as_exported_split_by_split(tmp_path: Path) -> None:
    write_yolo(
        tmp_path, "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n"
    )
    for old, new in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (tmp_path / new).mkdir(exist_ok=True)
            (tmp_path / kind / old).rename(tmp_path / new / kind)
    check(read_dense(str(tmp_path), None), ["train/images/a.jpg", "valid/images/b.jpg"])


def test_yolo_with_lists_of_files_and_with_a_list_of_classes(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "a", "train: [train.txt]\nval: val.txt\nnames: [cat, dog]\n")
    (root / "train.txt").write_text("./images/train/a.jpg\n./images/train/gone.jpg\n")
    (root / "val.txt").write_text("images/val/b.jpg\n")
    source = read_dense(str(root), None)
    assert source.skipped == [("images/train/gone.jpg", "missing file")]
    source.skipped.clear()
    check(source, ["images/train/a.jpg", "images/val/b.jpg"])
    other = write_yolo(tmp_path / "b", None)
    (other / "classes.txt").write_text("cat\ndog\n")
    source = read_dense(str(other), None)
    check(source, ["images/train/a.jpg", "images/val/b.jpg"])
    assert [sample.split for sample in source.samples] == ["train", "val"]


def test_yolo_polygons_are_masks(tmp_path: Path) -> None:
    corners = [(5, 5), (25, 5), (25, 20), (12, 26), (5, 20)]
    root = write_yolo(tmp_path)
    numbers = " ".join(f"{x / WIDTH:.7f} {y / HEIGHT:.7f}" for x, y in corners)
    for name in ("train/a", "val/b"):
        (root / "labels" / f"{name}.txt").write_text(f"1 {numbers}\n")
    source = read_dense(str(root), None)
    found = source.samples[0].target()
    assert source.has_masks
    np.testing.assert_allclose(found.boxes, [[5, 5, 25, 26]], atol=1e-4)
    drawn = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(drawn).polygon(corners, fill=1)
    mask = rle.decode(found.masks, (HEIGHT, WIDTH))[0]
    assert (mask & np.asarray(drawn)).sum() / (mask | np.asarray(drawn)).sum() > 0.9


def test_yolo_images_without_labels_and_labels_without_images(tmp_path: Path, capsys) -> None:
    root = write_yolo(tmp_path, None)
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "labels/train/a.txt").rename(root / "labels/train/c.txt")
    source = read_dense(str(root), None)
    assert source.skipped == [("labels/train/c.txt", "missing file: no image has these labels")]
    assert len(source.samples[0].target()) == 0
    assert "1 of 2 images have no labels" in capsys.readouterr().err


YOLO_LINES = {
    "unknown class: 2": "2 0.5 0.5 0.2 0.2",
    "malformed line: cat": "cat 0.5 0.5 0.2 0.2",
    "malformed line: 5 numbers": "1 0.5 0.5 0.2 0.2 0.9",
    "box of no area": "1 0.5 0.5 0 0.2",
    "box outside the image": "1 320 240 30 20",
    "not a box": "1 nan 0.5 0.2 0.2",
}


@pytest.mark.parametrize("reason", YOLO_LINES)
def test_bad_lines_of_yolo(tmp_path: Path, reason: str) -> None:
    root = write_yolo(tmp_path)
    with (root / "labels/train/a.txt").open("a") as file:
        file.write(YOLO_LINES[reason] + "\n\n")
    ((name, why),) = read_dense(str(root), None).skipped
    assert name == "images/train/a.jpg, object 3" and why.startswith(reason)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("names: [cat", "cannot read"),
        ("names: [cat, cat]", "list every class once"),
        ("names: {1: cat, 2: dog}", "list every class once"),
        ("names: [cat, dog]\nnc: 3", "nc is 3"),
        ("names: [cat, dog]\nkpt_shape: [17, 3]", "keypoints"),
        ("names: [cat, dog]\ntrain: images/gone", "neither a folder nor a list"),
        ("names: [cat, dog]\ntrain: ../../..", "outside of"),
        ("- cat", "is not YOLO's"),
    ],
)
def test_a_wrong_data_yaml_is_refused(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(MoceError, match=message):
        read_dense(str(write_yolo(tmp_path / "a/b/c", config)), None)


# --- VOC ----------------------------------------------------------------------------------------------


def voc_object(name: str, box, first: int = 1, difficult: int = 0) -> str:
    x1, y1, x2, y2 = box
    corners = {"xmin": x1 + first, "ymin": y1 + first, "xmax": x2, "ymax": y2}
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{inner}</bndbox></object>"


def voc_xml(name: str, objects: list[str], size=(WIDTH, HEIGHT)) -> str:
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{shape}{''.join(objects)}</annotation>"


def write_voc(
    root: Path, images: str = "JPEGImages", xml: str = "Annotations", first: int = 1
) -> Path:
    for name, objects in OBJECTS.items():
        write_image(root / images / f"{name}.jpg")
        path = root / xml / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(voc_xml(name, [voc_object(*each, first) for each in objects]))
    return root


def test_voc_as_downloaded(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    sets = root / "ImageSets/Main"
    sets.mkdir(parents=True)
    for name, text in {
        "train": "a\n",
        "val": "b\n",
        "trainval": "a\nb\n",
        "cat_train": "a  1\n",
    }.items():
        (sets / f"{name}.txt").write_text(text)
    source = read_dense(str(root), None)
    check(source, ["JPEGImages/a.jpg", "JPEGImages/b.jpg"])
    assert [sample.split for sample in source.samples] == ["train", "val"]


@pytest.mark.parametrize("first", [0, 1])
def test_xml_beside_the_images_counting_from_0_or_1(tmp_path: Path, first: int, capsys) -> None:
    check(read_dense(str(write_voc(tmp_path, "", "", first)), None), ["a.jpg", "b.jpg"])
    assert ("count from 0" in capsys.readouterr().err) == (first == 0)


def test_xml_somewhere_else(tmp_path: Path) -> None:
    write_voc(tmp_path, "pictures", "xml")
    check(read_dense(str(tmp_path / "pictures"), None, tmp_path / "xml"), ["a.jpg", "b.jpg"])


def test_xml_names_one_of_two_images_of_the_same_stem(tmp_path: Path) -> None:
    write_voc(tmp_path, "", "")
    write_image(tmp_path / "a.png")
    check(read_dense(str(tmp_path), None), ["a.jpg", "b.jpg"])


def test_difficult_objects_of_voc_do_not_count(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    objects = [voc_object("cat", (4, 3, 20, 15)), voc_object("dog", (0, 0, 9, 9), difficult=1)]
    (root / "Annotations/a.xml").write_text(voc_xml("a", objects))
    assert read_dense(str(root), None).samples[0].target().crowd.tolist() == [False, True]


def write_voc_masks(root: Path, names: str = "ab") -> Path:
    """A palette, and a border of 255 where nothing is known, as VOC's."""
    for name in names:
        values = object_numbers(name)
        values[-1] = np.where(values[-1], values[-1], 255)
        write_mask(root / "SegmentationObject" / f"{name}.png", values, palette=True)
    return root


def test_masks_of_vocs_objects(tmp_path: Path) -> None:
    source = read_dense(str(write_voc_masks(write_voc(tmp_path))), None)
    check(source, ["JPEGImages/a.jpg", "JPEGImages/b.jpg"])
    check_masks(source)


def test_vocs_images_with_masks_can_be_taken_alone(tmp_path: Path, capsys) -> None:
    """In VOC as downloaded a quarter of the images has masks, with lists of their own."""
    root = write_voc_masks(write_voc(tmp_path), "a")
    for kind, lines in {
        "Main": {"train": "b\n", "val": "a\n"},
        "Segmentation": {"val": "a\n"},
    }.items():
        for split, text in lines.items():
            path = root / "ImageSets" / kind / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert not read_dense(str(root), "detect").has_masks
    assert "1 of 2 images have masks of objects; too few" in capsys.readouterr().err
    source = read_dense(str(root), None, root / "SegmentationObject")
    assert source.has_masks and [(s.id, s.split) for s in source.samples] == [
        ("JPEGImages/a.jpg", "val")
    ]


@pytest.mark.parametrize(
    ("value", "where", "reason"),
    [
        (7, "JPEGImages/b.jpg", "mask of other objects: value 7 in b.png, 1 in the XML"),
        (0, "JPEGImages/b.jpg, object 1", "no mask"),
    ],
)
def test_bad_masks_of_vocs_objects(tmp_path: Path, value: int, where: str, reason: str) -> None:
    root = write_voc_masks(write_voc(tmp_path))
    values = np.where(object_numbers("b") == 1, value, 0)
    write_mask(root / "SegmentationObject/b.png", values)
    assert read_dense(str(root), None).skipped == [(where, reason)]


VOC_FAULTS = {
    "malformed XML": "<annotation><object>",
    "missing file: no image of this XML": voc_xml("z", []),
    "image of another size": voc_xml("b", [], (HEIGHT, WIDTH)),
}


@pytest.mark.parametrize("reason", VOC_FAULTS)
def test_bad_files_of_voc(tmp_path: Path, reason: str) -> None:
    root = write_voc(tmp_path)
    name = "z" if "missing" in reason else "b"
    (root / f"Annotations/{name}.xml").write_text(VOC_FAULTS[reason])
    ((where, why),) = read_dense(str(root), None).skipped
    assert name in where and why.startswith(reason)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (voc_object("", (1, 1, 5, 5)), "unknown class"),
        ("<object><name>cat</name></object>", "malformed annotation"),
        (voc_object("cat", (5, 5, 5, 9), 1), "box of no area"),
        (voc_object("cat", (50, 5, 60, 9), 1), "box outside the image"),
    ],
)
def test_bad_objects_of_voc(tmp_path: Path, entry: str, reason: str) -> None:
    root = write_voc(tmp_path)
    (root / "Annotations/b.xml").write_text(voc_xml("b", [voc_object(*OBJECTS["b"][0]), entry]))
    ((where, why),) = read_dense(str(root), None).skipped
    assert where == "JPEGImages/b.jpg, object 2" and why.startswith(reason)


@pytest.mark.parametrize("write", [write_yolo, write_voc])
def test_hidden_files_of_other_systems_are_left_out(tmp_path: Path, write) -> None:
    root = write(tmp_path)
    for path in list(root.rglob("*.*")):
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    (root / "__MACOSX").mkdir()
    source = read_dense(str(root), None)
    assert source.skipped == [] and len(source.samples) == 2


def test_text_with_a_byte_order_mark(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, None)
    (root / "classes.txt").write_text("\ufeffcat\ndog\n")
    label = root / "labels/train/a.txt"
    label.write_text("\ufeff" + label.read_text().replace("\n", "\r\n"))
    check(read_dense(str(root), None), ["images/train/a.jpg", "images/val/b.jpg"])


# --- tables -------------------------------------------------------------------------------------------


def encoded(path: Path) -> bytes:
    return path.read_bytes()


def object_columns(kind: str) -> list[dict[str, list]]:
    """What is known of the objects of every image; boxes as x, y, width, height, or as corners."""

    def written(box):
        x1, y1, x2, y2 = box
        return list(box) if kind == "corners" else [x1, y1, x2 - x1, y2 - y1]

    return [
        {
            "bbox": [written(box) for _, box in objects],
            "category": [name if kind == "words" else CLASSES.index(name) for name, _ in objects],
        }
        for objects in OBJECTS.values()
    ]  # fmt: skip


def images(root: Path) -> list[bytes]:
    return [write_image(root / f"{name}.jpg").read_bytes() for name in OBJECTS]


@pytest.mark.parametrize("kind", ["words", "numbers", "corners"])
@pytest.mark.parametrize("form", ["lists", "structs"])
def test_parquet_with_objects(tmp_path: Path, kind: str, form: str, capsys) -> None:
    objects: list = object_columns(kind)
    if form == "structs":
        objects = [
            [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]
            for each in objects
        ]
    table = pyarrow.table({"image": images(tmp_path), "id": ["a", "b"], "objects": objects})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    source = read_dense(str(tmp_path / "x.parquet"), None)
    source.classes = (
        source.classes if kind == "words" else [CLASSES[int(n)] for n in source.classes]
    )
    check(source, ["a", "b"])
    assert ("taken as x1, y1, x2, y2" in capsys.readouterr().err) == (kind == "corners")


def mask_of_object(name: str, number: int, form: str):
    """As tables write it: a polygon, several, COCO's run lengths or an image."""
    mask = object_numbers(name) == number
    if form == "run lengths":
        packed = rle.encode(mask[None])[0]
        return {"size": list(packed["size"]), "counts": packed["counts"].decode()}
    if form == "images":
        file = io.BytesIO()
        Image.fromarray((mask * 255).astype(np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}
    x1, y1, x2, y2 = OBJECTS[name][number - 1][1]
    corners = [float(v) for v in (x1, y1, x2, y1, x2, y2, x1, y2)]
    return corners if form == "polygon" else [corners]


@pytest.mark.parametrize("form", ["polygon", "polygons", "run lengths", "images", "column"])
def test_parquet_with_masks_of_objects(tmp_path: Path, form: str) -> None:
    masks = [
        [
            mask_of_object(name, n, "images" if form == "column" else form)
            for n in range(1, count + 1)
        ]
        for name, count in (("a", 2), ("b", 1))
    ]
    cells: dict = {"image": images(tmp_path), "id": ["a", "b"]}
    objects = object_columns("words")
    if form == "column":
        cells |= {"objects": objects, "masks": masks}
    else:
        both = zip(objects, masks, strict=True)
        cells |= {"objects": [{**each, "segmentation": own} for each, own in both]}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "x.parquet")
    source = read_dense(str(tmp_path / "x.parquet"), None)
    check(source, ["a", "b"])
    if "polygon" in form:  # the first object is not cut where the second covers it
        first = rle.areas(source.samples[0].target().masks[:1])
        assert source.has_masks and first == [16 * 12]
    else:
        check_masks(source)


def test_masks_of_objects_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    short = [[mask_of_object("a", 1, "images")], [mask_of_object("b", 1, "images")]]
    cells = {"image": images(tmp_path), "objects": object_columns("words"), "masks": short}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "x.parquet")
    source = read_dense(str(tmp_path / "x.parquet"), None, max_skipped=0.9)
    assert [reason for _, reason in source.skipped] == [
        "another number of masks: 1 for 2 objects"
    ] * 2
    assert [len(sample.target()) for sample in source.samples] == [0, 1]


def test_a_hugging_face_set_with_masks_of_objects(tmp_path: Path) -> None:
    masks = [[mask_of_object(n, k + 1, "images") for k in range(len(OBJECTS[n]))] for n in OBJECTS]
    rows = {
        "image": [{"bytes": b, "path": None} for b in images(tmp_path)],
        "objects": object_columns("numbers"),
        "masks": masks,
    }
    features = datasets.Features({**hf_features(), "masks": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "x")
    check_masks(read_dense(str(tmp_path / "x"), None))


def test_one_of_several_sources_is_never_taken_silently(tmp_path: Path) -> None:
    write_voc(tmp_path / "x")
    write_image(tmp_path / "y/cat/1.jpg")
    several = f"{tmp_path / 'x'},{tmp_path / 'y'}"
    for read in (task_of, lambda data: read_dense(data, "detect")):
        with pytest.raises(MoceError, match="2 sources: boxes and masks are read from one"):
            read(several)
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'x'}\n")
    check(read_dense(f"@{tmp_path / 'list.txt'}", None), ["JPEGImages/a.jpg", "JPEGImages/b.jpg"])


def test_parquet_with_masks(tmp_path: Path) -> None:
    masks = []
    for seed in (1, 2):
        file = io.BytesIO()
        Image.fromarray(class_values(seed, (0, 1, 2, 255)).astype(np.uint8)).save(file, "PNG")
        masks.append(file.getvalue())
    table = pyarrow.table(
        {"image": images(tmp_path), "annotation": [{"bytes": m, "path": None} for m in masks]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    source = read_dense(str(tmp_path / "x.parquet"), None)
    assert (source.task, source.classes) == ("segment", ["0", "1", "2"])
    for seed, sample in enumerate(source.samples, 1):
        np.testing.assert_array_equal(sample.target(), class_values(seed, (0, 1, 2, 255)))


def hf_features():
    label = datasets.ClassLabel(names=CLASSES)
    boxes = datasets.List(datasets.List(datasets.Value("float32"), length=4))
    objects = {"bbox": boxes, "category": datasets.List(label)}
    return datasets.Features({"image": datasets.Image(), "objects": objects})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_hugging_face_set_with_objects(tmp_path: Path, form: str) -> None:
    rows = {
        "image": [{"bytes": b, "path": None} for b in images(tmp_path)],
        "objects": object_columns("numbers"),
    }
    table = datasets.Dataset.from_dict(rows, features=hf_features())
    data = tmp_path / ("x" if form == "saved" else "x.parquet")
    if form == "saved":
        datasets.DatasetDict(train=table.select([0]), validation=table.select([1])).save_to_disk(
            data
        )
    else:
        table.to_parquet(data)
    source = read_dense(str(data), None)
    check(source, ["train/0", "validation/0"] if form == "saved" else ["0", "1"])
    if form == "saved":
        assert [sample.split for sample in source.samples] == ["train", "val"]


def test_a_folder_of_parquet_files_with_objects(tmp_path: Path) -> None:
    """As a data set is downloaded: the files' names state the splits."""
    rows = zip(images(tmp_path / "x"), object_columns("numbers"), ("train", "test"), strict=True)
    for content, objects, split in rows:
        cells = {"image": [{"bytes": content, "path": None}], "objects": [objects]}
        table = datasets.Dataset.from_dict(cells, features=hf_features())
        table.to_parquet(tmp_path / f"set/data/{split}-00000-of-00001.parquet")
    source = read_dense(str(tmp_path / "set"), None)
    order = [sample.split for sample in source.samples]
    assert sorted(order) == ["test", "train"]
    first = source.samples[order.index("train")].target()
    np.testing.assert_allclose(first.boxes, [box for _, box in OBJECTS["a"]], atol=1e-4)
    table.to_parquet(tmp_path / "set/data/more/val.parquet")  # deeper: not of these files
    with pytest.raises(MoceError, match="holds 3 images, but 2 rows of objects"):
        read_dense(str(tmp_path / "set"), None)


def test_a_hugging_face_set_with_masks(tmp_path: Path) -> None:
    kind = datasets.Image()
    masks = [Image.fromarray(class_values(n, (0, 3)).astype(np.uint8)) for n in (1, 2)]
    features = datasets.Features({"pixel_values": kind, "label": kind})
    rows = {"pixel_values": [{"bytes": b, "path": None} for b in images(tmp_path)], "label": masks}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "x")
    assert task_of(str(tmp_path / "x")) == "segment"
    source = read_dense(str(tmp_path / "x"), "segment")
    np.testing.assert_array_equal(source.samples[1].target(), class_values(2, (0, 3)))
