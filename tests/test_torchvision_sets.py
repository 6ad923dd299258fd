"""The paper's eleven tasks, each from a small folder in its real format."""

from __future__ import annotations

import json
import shutil
import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import picture
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from moce.data.readers.factory import open_source
from moce.data.readers.torchvision import CALTECH_TRAIN, SETS
from moce.errors import MoceError
from moce.evaluation.metrics import METRICS
from moce.evaluation.task import load_task

SIZE = (16, 16)
RED, GREEN, BLUE = (200, 30, 60), (10, 220, 90), (5, 6, 240)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of data sets, empty, on a machine without network."""

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("MOCE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    return tmp_path / "data"


def write_picture(path: Path, color: tuple[int, int, int] = RED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(color).save(path, quality=95)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


# --- the eleven formats: each writer leaves train and test images of two classes ------------------


def write_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    write_text(data / "variants.txt", "707-320", "F/A-18")
    write_text(data / "images_variant_trainval.txt", "0000001 707-320", "0000002 F/A-18")
    write_text(data / "images_variant_test.txt", "0000003 F/A-18")
    for number, color in enumerate((RED, GREEN, BLUE), 1):
        write_picture(data / "images" / f"000000{number}.jpg", color)


def write_caltech101(root: Path) -> None:
    classes = root / "caltech101" / "101_ObjectCategories"
    write_picture(classes / "BACKGROUND_Google" / "image_0001.jpg")
    for name, count, color in (("accordion", 33, RED), ("zebra", 31, BLUE)):
        for number in range(1, count + 1):
            write_picture(classes / name / f"image_{number:04d}.jpg", color)


def write_cars(root: Path) -> None:
    cars = root / "stanford_cars"
    names = np.array(["AM General Hummer SUV 2000", "Audi TT RS Coupe 2012"], object)
    kind = [("class", object), ("fname", object)]
    train = np.array([(1, "00001.jpg"), (2, "00002.jpg")], kind)
    test = np.array([(2, "00001.jpg"), (1, "00002.jpg")], kind)
    (cars / "devkit").mkdir(parents=True)
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": names})
    savemat(cars / "devkit" / "cars_train_annos.mat", {"annotations": train})
    savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": test})
    for folder, colors in (("cars_train", (RED, GREEN)), ("cars_test", (BLUE, RED))):
        for number, color in enumerate(colors, 1):
            write_picture(cars / folder / f"0000{number}.jpg", color)


def cifar_rows(*rows: tuple[tuple[int, ...], tuple[int, int, int]]) -> bytes:
    """Label bytes, then a plane of 1024 bytes each of red, green and blue."""
    return b"".join(
        bytes(labels) + b"".join(bytes([value]) * 1024 for value in color) for labels, color in rows
    )


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    write_text(folder / "batches.meta.txt", "airplane", "automobile", "bird", "")
    for number in range(1, 6):
        batch = cifar_rows(((number % 2,), RED), ((2,), GREEN))
        (folder / f"data_batch_{number}.bin").write_bytes(batch)
    (folder / "test_batch.bin").write_bytes(cifar_rows(((2,), BLUE)))


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-binary"
    write_text(folder / "fine_label_names.txt", "apple", "aquarium_fish", "baby")
    (folder / "train.bin").write_bytes(cifar_rows(((9, 2), RED), ((1, 0), GREEN)))
    (folder / "test.bin").write_bytes(cifar_rows(((7, 2), BLUE)))


def write_dtd(root: Path) -> None:
    data = root / "dtd" / "dtd"
    splits = {
        "train": (("banded", 2, RED), ("zigzagged", 4, GREEN)),
        "val": (("zigzagged", 5, GREEN),),
        "test": (("banded", 3, BLUE),),
    }
    for split, images in splits.items():
        files = [(f"{name}/{name}_000{number}.jpg", color) for name, number, color in images]
        write_text(data / "labels" / f"{split}1.txt", *(file for file, _ in files))
        for file, color in files:
            write_picture(data / "images" / file, color)


def write_flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number, color in enumerate((RED, GREEN, BLUE, GREEN), 1):
        write_picture(folder / "jpg" / f"image_0000{number}.jpg", color)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 77, 77, 1]], np.uint8)})
    # Two each: scipy squeezes a list of one to a bare number, which torchvision does not expect.
    splits = {"trnid": [[1, 2]], "valid": [[4, 4]], "tstid": [[3, 3]]}
    savemat(folder / "setid.mat", {name: np.array(ids) for name, ids in splits.items()})


def write_food(root: Path) -> None:
    folder = root / "food-101"
    parts = {
        "train": {"apple_pie": ["apple_pie/1005649"], "waffles": ["waffles/1005755"]},
        "test": {"apple_pie": [], "waffles": ["waffles/1018159"]},
    }
    for part, files in parts.items():
        write_text(folder / "meta" / f"{part}.json", json.dumps(files))
    write_picture(folder / "images" / "apple_pie" / "1005649.jpg", RED)
    write_picture(folder / "images" / "waffles" / "1005755.jpg", GREEN)
    write_picture(folder / "images" / "waffles" / "1018159.jpg", BLUE)


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    notes = folder / "annotations"
    write_text(notes / "trainval.txt", "Abyssinian_100 1 1 1", "american_bulldog_100 2 2 1")
    write_text(notes / "test.txt", "Abyssinian_201 1 1 1", "american_bulldog_203 2 2 1")
    write_picture(folder / "images" / "Abyssinian_100.jpg", RED)
    write_picture(folder / "images" / "american_bulldog_100.jpg", GREEN)
    write_picture(folder / "images" / "Abyssinian_201.jpg", BLUE)
    write_picture(folder / "images" / "american_bulldog_203.jpg", GREEN)


def write_sun397(root: Path) -> None:
    folder = root / "SUN397"
    classes = ["/a/abbey", "/a/apartment_building/outdoor"]
    write_text(folder / "ClassName.txt", *classes)
    train = [f"{name}/sun_aaa{number}.jpg" for number, name in enumerate(classes)]
    test = [f"{classes[1]}/sun_zzz.jpg"]
    write_text(folder / "Training_01.txt", *train)
    write_text(folder / "Testing_01.txt", *test)
    unused = f"{classes[0]}/sun_unused.jpg"  # the partitions do not cover every image
    for file, color in zip([*train, *test, unused], (RED, GREEN, BLUE, RED), strict=True):
        write_picture(folder / file.lstrip("/"), color)


def voc_xml(*objects: tuple[str, int]) -> str:
    """(class, difficult) of every object; one has a part, as people have."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return "<annotation><folder>VOC2007</folder>{}</annotation>".format(
        "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}</object>"
            for name, difficult in objects
        )
    )


def write_voc2007(root: Path) -> None:
    folder = root / "VOCdevkit" / "VOC2007"
    images = {
        "000001": (RED, voc_xml(("person", 0), ("dog", 0), ("person", 0))),
        "000002": (GREEN, voc_xml(("dog", 0), ("car", 1), ("car", 0))),
        "000003": (GREEN, voc_xml(("person", 1))),
        "000004": (BLUE, voc_xml(("car", 0), ("dog", 1))),
    }
    write_text(folder / "ImageSets" / "Main" / "trainval.txt", "000001", "000002", "000003")
    write_text(folder / "ImageSets" / "Main" / "test.txt", "000004")
    for name, (color, xml) in images.items():
        write_picture(folder / "JPEGImages" / f"{name}.jpg", color)
        write_text(folder / "Annotations" / f"{name}.xml", xml)


@pytest.fixture
def unchecked_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares the .mat files with the md5 of the official ones, which ours are not."""
    monkeypatch.setattr(
        "torchvision.datasets.flowers102.check_integrity", lambda path, _: Path(path).is_file()
    )


Writer = Callable[[Path], None]
# name: (writer, training labels, test labels, id of the last image, color of the first test image)
SMALL: dict[str, tuple[Writer, list, list, str, tuple[int, int, int]]] = {
    "aircraft": (
        write_aircraft,
        ["707-320", "F/A-18"],
        ["F/A-18"],
        "fgvc-aircraft-2013b/data/images/0000003.jpg",
        BLUE,
    ),
    "caltech101": (
        write_caltech101,
        ["accordion"] * 30 + ["zebra"] * 30,
        ["accordion"] * 3 + ["zebra"],
        "caltech101/101_ObjectCategories/zebra/image_0031.jpg",
        RED,
    ),
    "cars": (
        write_cars,
        ["AM General Hummer SUV 2000", "Audi TT RS Coupe 2012"],
        ["Audi TT RS Coupe 2012", "AM General Hummer SUV 2000"],
        "stanford_cars/cars_test/00002.jpg",
        BLUE,
    ),
    "cifar10": (
        write_cifar10,
        ["automobile", "bird", "airplane", "bird"] * 2 + ["automobile", "bird"],
        ["bird"],
        "test/0",
        BLUE,
    ),
    "cifar100": (write_cifar100, ["baby", "apple"], ["baby"], "test/0", BLUE),
    "dtd": (
        write_dtd,
        ["banded", "zigzagged", "zigzagged"],
        ["banded"],
        "dtd/dtd/images/banded/banded_0003.jpg",
        BLUE,
    ),
    "flowers": (
        write_flowers,
        ["pink primrose", "passion flower"] + ["pink primrose"] * 2,
        ["passion flower"] * 2,
        "flowers-102/jpg/image_00003.jpg#2",  # the split names it twice
        BLUE,
    ),
    "food": (
        write_food,
        ["apple_pie", "waffles"],
        ["waffles"],
        "food-101/images/waffles/1018159.jpg",
        BLUE,
    ),
    "pets": (
        write_pets,
        ["Abyssinian", "American Bulldog"],
        ["Abyssinian", "American Bulldog"],
        "oxford-iiit-pet/images/american_bulldog_203.jpg",
        BLUE,
    ),
    "sun397": (
        write_sun397,
        ["abbey", "apartment_building/outdoor"],
        ["apartment_building/outdoor"],
        "SUN397/a/apartment_building/outdoor/sun_zzz.jpg",
        BLUE,
    ),
    "voc2007": (
        write_voc2007,
        [("dog", "person"), ("car", "dog"), ()],
        [("car",)],
        "VOCdevkit/VOC2007/JPEGImages/000004.jpg",
        BLUE,
    ),
}


def test_every_task_of_the_paper_is_tested() -> None:
    assert len(SETS) == 11 and SMALL.keys() == SETS.keys()


@pytest.mark.usefixtures("unchecked_flowers")
@pytest.mark.parametrize("name", SMALL)
def test_small_copy_of_the_real_format(name: str, root: Path) -> None:
    write, train_labels, test_labels, last, color = SMALL[name]
    write(root)
    samples = open_source(f"torchvision:{name}")
    by_split = {s: [e.label for e in samples if e.split == s] for s in ("train", "test")}
    assert by_split == {"train": train_labels, "test": test_labels}
    assert samples[-1].id == last
    task = load_task(f"torchvision:{name}", (3, *SIZE))
    assert task.skipped == [] and task.multi_label == isinstance(train_labels[0], tuple)
    assert task.train.labels == train_labels and task.test.labels == test_labels
    assert np.abs(task.test.pixels[0].float().mean((1, 2)).numpy() - color).max() < 3  # JPEG


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"cifar10", "cifar100"}))
@pytest.mark.usefixtures("unchecked_flowers")
def test_listing_opens_no_image(name: str, root: Path, monkeypatch) -> None:
    SMALL[name][0](root)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded while listing"))
    assert open_source(f"torchvision:{name}")


def test_cifar_keeps_planes_rows_and_columns_apart(root: Path) -> None:
    write_cifar10(root)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    row = bytes([1]) + pixels.transpose(2, 0, 1).tobytes()
    (root / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(row)
    assert np.array_equal(np.asarray(open_source("torchvision:cifar10")[-1].open()), pixels)


def test_cifar_cut_short_is_refused(root: Path) -> None:
    write_cifar10(root)
    batch = root / "cifar-10-batches-bin" / "data_batch_4.bin"
    batch.write_bytes(batch.read_bytes()[:-7])
    with pytest.raises(MoceError, match="cifar-10-binary"):
        open_source("torchvision:cifar10")


def test_cifar_archive_is_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(root)
    folder = root / "cifar-100-binary"
    with tarfile.open(root / "cifar-100-binary.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    with pytest.raises(MoceError, match="no network"):  # not the official one: fetched anew
        open_source("torchvision:cifar100")
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    assert [e.label for e in open_source("torchvision:cifar100")] == ["baby", "apple", "baby"]


def test_caltech_split_is_random_and_the_same_every_time(root: Path) -> None:
    write_caltech101(root)
    first, second = (open_source("torchvision:caltech101") for _ in range(2))
    assert [(e.id, e.split) for e in first] == [(e.id, e.split) for e in second]
    accordion = [sample.split for sample in first if sample.label == "accordion"]
    assert accordion.count("train") == CALTECH_TRAIN == 30
    assert accordion[CALTECH_TRAIN:] != ["test"] * 3  # not simply the first thirty


def test_multi_label_task_has_zeros_and_ones(root: Path) -> None:
    write_voc2007(root)
    task = load_task("torchvision:voc2007", (3, *SIZE))
    assert task.classes == ["car", "dog", "person"] and task.multi_label
    assert task.train_labels.dtype == np.float32
    assert task.train_labels.tolist() == [[0, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert task.test_labels.tolist() == [[1, 0, 0]]


def test_flowers_have_distinct_class_names() -> None:
    assert len(set(Flowers102.classes)) == 102


# --- what goes wrong ------------------------------------------------------------------------------


def message(data: str) -> str:
    with pytest.raises(MoceError) as caught:
        open_source(data)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    assert "did you mean 'torchvision:flowers'?" in message("torchvision:flower")
    assert all(f"torchvision:{name}" in message("torchvision:") for name in SETS)


@pytest.mark.parametrize("name", SETS)
def test_missing_data_without_network_says_what_to_put_where(name: str, root: Path) -> None:
    text = message(f"torchvision:{name}")
    assert SETS[name].needs in text and str(root) in text and "MOCE_DATA" in text


@pytest.mark.usefixtures("unchecked_flowers")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt"),
        ("cars", "stanford_cars/devkit/cars_meta.mat"),
        ("flowers", "flowers-102/setid.mat"),
        ("food", "food-101/meta/train.json"),
        ("pets", "oxford-iiit-pet/annotations/test.txt"),
        ("voc2007", "VOCdevkit/VOC2007/Annotations/000004.xml"),
    ],
)
def test_broken_files_are_one_line(name: str, file: str, root: Path) -> None:
    SMALL[name][0](root)
    (root / file).write_text("<junk\nof two lines")
    assert SETS[name].needs in message(f"torchvision:{name}")


def test_broken_archive_is_one_line(root: Path) -> None:
    write_text(root / "fgvc-aircraft-2013b.tar.gz", "<html>404")
    assert "ReadError" in message("torchvision:aircraft")


def test_sun_without_its_partition_says_where_to_get_it(root: Path) -> None:
    write_sun397(root)
    (root / "SUN397" / "Testing_01.txt").unlink()
    assert "Partitions.zip" in message("torchvision:sun397")


def test_missing_half_is_downloaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VOC archives are two: one that is there must not be fetched again for the other."""
    write_voc2007(root)
    (root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    fetched = []

    def download(url: str, *_: object, **__: object) -> None:
        fetched.append(url.rsplit("/", 1)[1])
        write_text(root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt", "000004")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", download)
    assert len(open_source("torchvision:voc2007")) == 4
    assert fetched == ["VOCtest_06-Nov-2007.tar"]


# --- the suite ------------------------------------------------------------------------------------


def test_the_paper_suite_names_every_task_and_known_metrics() -> None:
    file = Path(__file__).parents[1] / "recipes" / "suites" / "paper11.yaml"
    tasks = yaml.safe_load(file.read_text())["tasks"]
    assert [task["data"] for task in tasks] == [f"torchvision:{name}" for name in SETS]
    assert [task["name"] for task in tasks] == list(SETS)
    assert {task["metric"] for task in tasks} == set(METRICS)
