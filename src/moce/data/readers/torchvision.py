"""The paper's eleven transfer tasks from torchvision, with official splits: torchvision:NAME.

All are in one folder, $MOCE_DATA or ~/.cache/moce/data, laid out as torchvision does it. Missing
data sets are downloaded if that is still possible.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from moce.config import expand
from moce.data.readers.sample import Encoded, Label, Sample, error_line
from moce.errors import MoceError

TORCHVISION_PREFIX = "torchvision:"
DEFAULT_FOLDER = "~/.cache/moce/data"
CALTECH_TRAIN = 30  # training images per class, by convention
CALTECH_SEED = 0  # of the one draw of them that everyone who uses moce shares
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
SUN_SPLITS = {"train": "Training_01.txt", "test": "Testing_01.txt"}
SUN_SPLITS_URL = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"


@dataclass(frozen=True)
class TorchvisionSet:
    """read: the images of a data set in a folder. needs: files it needs there, for error messages."""

    read: Callable[[Path], Iterable[Sample]]
    needs: str


def read_torchvision(name: str) -> list[Sample]:
    """The images of a data set. Raises MoceError if it is unknown or cannot be downloaded."""
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1)
        hint = f" (did you mean '{TORCHVISION_PREFIX}{near[0]}'?)" if near else ""
        valid = ", ".join(TORCHVISION_PREFIX + known for known in SETS)
        raise MoceError(f"no data set '{TORCHVISION_PREFIX}{name}'{hint}; valid: {valid}")
    folder = expand(Path(os.environ.get("MOCE_DATA") or DEFAULT_FOLDER))
    try:
        return list(SETS[name].read(folder))
    except MoceError:
        raise
    except Exception as error:  # of sockets, archives and parsers: any type
        raise MoceError(
            f"cannot read {TORCHVISION_PREFIX}{name} from {folder} or download it "
            f"({error_line(error)}); put {SETS[name].needs} there, or set MOCE_DATA to the folder that has it"
        ) from None


def _or_after(download: Callable[[], object], read: Callable[[], Any]) -> Any:
    """Read, after a download if necessary."""
    try:
        return read()
    except Exception:  # missing or broken: in any case, a complete copy helps
        download()
        return read()


def _dataset(kind: str, folder: Path, **options: Any) -> Any:
    """A data set of torchvision's class `kind`, downloaded if it is not in the folder."""
    import torchvision.datasets

    build = partial(getattr(torchvision.datasets, kind), folder, **options)
    return _or_after(partial(build, download=True), build)


def _sample(folder: Path, path: str | Path, label: Label, split: str) -> Sample:
    path = Path(path)
    return Sample(path.relative_to(folder).as_posix(), Encoded(path), label, split)


def _with_splits(kind: str, splits: dict[str, str], folder: Path) -> Iterator[Sample]:
    """A torchvision class with splits and a loader. splits: torchvision's names to ours."""
    for name, split in splits.items():
        found = _dataset(kind, folder, split=name, loader=str)  # keeps the path: decodes nothing
        for path, number in (found[index] for index in range(len(found))):
            yield _sample(folder, path, str(found.classes[number]), split)


def _pets(folder: Path) -> Iterator[Sample]:
    for name, split in _TRAINVAL_TEST.items():
        found = _dataset("OxfordIIITPet", folder, split=name)
        # The one class without a loader: its items are decoded images, the paths are private.
        for path, number in zip(found._images, found._labels, strict=True):
            yield _sample(folder, path, found.classes[number], split)


def _caltech101(folder: Path) -> Iterator[Sample]:
    """Trains on 30 random images of each class, tests on the rest; without the background class."""
    found = _dataset("Caltech101", folder)
    classes = np.array(found.y)
    for number, name in enumerate(found.categories):
        members = np.flatnonzero(classes == number)
        drawn = np.random.default_rng([CALTECH_SEED, number]).permutation(len(members))
        for place, index in enumerate(members):
            file = f"image_{found.index[index]:04d}.jpg"
            path = folder / "caltech101" / "101_ObjectCategories" / name / file
            split = "train" if drawn[place] < CALTECH_TRAIN else "test"
            yield _sample(folder, path, name, split)


def _sun397(folder: Path) -> Iterator[Sample]:
    """The first of the ten official partitions, whose lists torchvision does not download."""
    found = _dataset("SUN397", folder, loader=str)
    root = folder / "SUN397"
    if not all((root / file).is_file() for file in SUN_SPLITS.values()):
        files = " and ".join(SUN_SPLITS.values())
        raise MoceError(f"no {files} in {root}; get them from {SUN_SPLITS_URL}")
    labels = dict(found[index] for index in range(len(found)))
    for split, file in SUN_SPLITS.items():
        for line in (root / file).read_text(encoding="utf-8").split():
            path = root / line.lstrip("/")
            yield _sample(folder, path, found.classes[labels[str(path)]], split)


def _voc2007(folder: Path) -> Iterator[Sample]:
    for name, split in _TRAINVAL_TEST.items():
        found = _dataset("VOCDetection", folder, year="2007", image_set=name)
        for path, annotation in zip(found.images, found.annotations, strict=True):
            yield _sample(folder, path, _voc_labels(found, annotation), split)


def _voc_labels(found: Any, annotation: str) -> tuple[str, ...]:
    """Classes of an image's objects, without objects marked difficult, as VOC scores them."""
    tree = found.parse_voc_xml(ElementTree.parse(annotation).getroot())
    objects = tree["annotation"]["object"]
    return tuple(sorted({item["name"] for item in objects if item.get("difficult") != "1"}))


@dataclass(frozen=True)
class Cifar:
    """CIFAR in its binary version: rows of `skip` + 1 label bytes, then the pixels.

    torchvision reads only the Python version, which is pickled; moce unpickles nothing.
    """

    root: str
    archive: str
    md5: str
    names: str
    files: dict[str, tuple[str, ...]]
    skip: int = 0  # label bytes before the label

    def read(self, folder: Path) -> list[Sample]:
        return _or_after(
            partial(self._download, folder), partial(self._samples, folder / self.root)
        )

    def _download(self, folder: Path) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(CIFAR_URL + self.archive, str(folder), md5=self.md5)

    def _samples(self, root: Path) -> list[Sample]:
        names = (root / self.names).read_text(encoding="utf-8").split()
        samples: list[Sample] = []
        for split, files in self.files.items():
            content = [np.asarray(np.memmap(root / file, np.uint8, "r")) for file in files]
            rows = [row for array in content for row in array.reshape(-1, self.skip + 1 + 3072)]
            for number, row in enumerate(rows):
                opened = partial(_cifar_image, row[self.skip + 1 :])
                samples.append(Sample(f"{split}/{number}", opened, names[row[self.skip]], split))
        return samples


def _cifar_image(pixels: np.ndarray) -> Image.Image:
    """pixels: [3072] uint8, the planes of red, green and blue."""
    return Image.fromarray(np.ascontiguousarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)))


CIFAR10 = Cifar(
    root="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    names="batches.meta.txt",
    files={
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test": ("test_batch.bin",),
    },
)
CIFAR100 = Cifar(
    root="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    names="fine_label_names.txt",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    skip=1,  # the coarse label
)

_TRAIN_TEST = {"train": "train", "test": "test"}
_TRAIN_VAL_TEST = {"train": "train", "val": "train", "test": "test"}
_TRAINVAL_TEST = {"trainval": "train", "test": "test"}

SETS = {
    "aircraft": TorchvisionSet(
        partial(_with_splits, "FGVCAircraft", _TRAINVAL_TEST),
        "fgvc-aircraft-2013b/data (from fgvc-aircraft-2013b.tar.gz)",
    ),
    "caltech101": TorchvisionSet(
        _caltech101,
        "caltech101/101_ObjectCategories with all its folders, BACKGROUND_Google too "
        "(from caltech-101.zip)",
    ),
    "cars": TorchvisionSet(
        partial(_with_splits, "StanfordCars", _TRAIN_TEST),
        "stanford_cars/ with cars_train, cars_test, devkit and cars_test_annos_withlabels.mat",
    ),
    "cifar10": TorchvisionSet(CIFAR10.read, f"{CIFAR10.root} (from {CIFAR10.archive})"),
    "cifar100": TorchvisionSet(CIFAR100.read, f"{CIFAR100.root} (from {CIFAR100.archive})"),
    "dtd": TorchvisionSet(  # partition 1 is torchvision's default
        partial(_with_splits, "DTD", _TRAIN_VAL_TEST),
        "dtd/dtd with images and labels (from dtd-r1.0.1.tar.gz)",
    ),
    "flowers": TorchvisionSet(
        partial(_with_splits, "Flowers102", _TRAIN_VAL_TEST),
        "flowers-102/ with jpg (from 102flowers.tgz), imagelabels.mat and setid.mat",
    ),
    "food": TorchvisionSet(
        partial(_with_splits, "Food101", _TRAIN_TEST),
        "food-101/ with images and meta (from food-101.tar.gz)",
    ),
    "pets": TorchvisionSet(
        _pets,
        "oxford-iiit-pet/ with images and annotations (from images.tar.gz, annotations.tar.gz)",
    ),
    "sun397": TorchvisionSet(
        _sun397,
        f"SUN397 (from SUN397.tar.gz) with {' and '.join(SUN_SPLITS.values())} "
        f"(from {SUN_SPLITS_URL})",
    ),
    "voc2007": TorchvisionSet(
        _voc2007,
        "VOCdevkit/VOC2007 (from VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar)",
    ),
}
