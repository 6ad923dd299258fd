"""Held-out tasks of pictures: icons by category, sprites by creature, textures by material."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tools.image_sources import (
    SIZE,
    Package,
    Pixels,
    Pool,
    Wheel,
    fetch,
    fetch_wheel,
    members,
    require,
)

# Remix Icon, up to version 4.6 under the Apache License 2.0.
REMIX_ICON = Package(
    "remixicon", "4.6.0", "dfbfcaadee403404d541d96d5e041f99197dce462e563a48c110e0877d9c3a53"
)
# Carries Freedoom's game data (BSD 3-Clause License).
VIZDOOM = Wheel(
    "vizdoom",
    "1.2.4",
    "311",
    "cp311",
    "manylinux_2_28_x86_64",
    "ce3ecb23abb5c3e58213f1ce12bdf30be9bb856a94b9d86610ac378be712c0fd",
)
# The last version with all its photographs inside: those used here are CC0 or public domain.
SCIKIT_IMAGE = Wheel(
    "scikit-image",
    "0.16.2",
    "36",
    "cp36m",
    "manylinux1_x86_64",
    "063d1c20fcd53762f82ee58c29783ae4e8f6fbed445b41b704fa33b6f355729d",
)


# Icons

# Without Logos (trademarks), Others (no meaning) and Food (30 icons).
ICON_CATEGORIES = (
    "Arrows",
    "Buildings",
    "Business",
    "Communication",
    "Design",
    "Development",
    "Device",
    "Document",
    "Editor",
    "Finance",
    "Health & Medical",
    "Map",
    "Media",
    "System",
    "User & Faces",
    "Weather",
)


def icons(cache: Path, seed: int) -> Pool:
    """Remix Icon by category, in a dark color on white; an icon's two styles are on one side."""
    rng = np.random.default_rng(seed)
    archive = fetch(REMIX_ICON, cache)
    fonts = dict(members(archive, "fonts"))
    found = re.findall(
        r'\.ri-([\w-]+):before \{ content: "\\(\w+)"', fonts["remixicon.css"].decode()
    )
    codes = {name: chr(int(code, 16)) for name, code in found}
    font = ImageFont.truetype(io.BytesIO(fonts["remixicon.ttf"]), 4 * SIZE - 16)
    missing = bytes(font.getmask("\U0010fffe"))
    ids, images, labels = [], [], []
    for category in ICON_CATEGORIES:
        for file, _ in sorted(members(archive, f"icons/{category}")):
            name = file.removesuffix(".svg")
            require(bytes(font.getmask(codes[name])) not in (missing, b""), f"no icon {name}")
            ids.append(f"icons/{name}")
            images.append(icon_image(codes[name], font, rng))
            labels.append(category)
    motifs = [re.sub(r"-(line|fill)$", "", name) for name in ids]
    chosen = set(rng.permutation(sorted(set(motifs)))[: len(set(motifs)) // 3].tolist())
    splits = ["task_train" if motif in chosen else "task_test" for motif in motifs]
    return Pool("icons", ids, np.stack(images), labels, splits)


def icon_image(code: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Pixels:
    """An icon in a random dark color on white, [32, 32, 3]."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), "white")
    ink = tuple(rng.integers(0, 160, 3).tolist())
    middle = (2 * SIZE, 2 * SIZE)
    ImageDraw.Draw(image).text(middle, code, fill=ink, font=font, anchor="mm")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


# Sprites

CREATURES = {
    "POSS": "zombie",
    "SPOS": "shotgun zombie",
    "CPOS": "minigun zombie",
    "TROO": "serpentipede",
    "SARG": "flesh worm",
    "HEAD": "trilobite",
    "SKUL": "deadflare",
    "BOSS": "pain lord",
    "BOS2": "pain bringer",
    "PAIN": "matribite",
    "BSPI": "technospider",
    "SKEL": "dark soldier",
    "FATT": "combat slug",
    "VILE": "flame bringer",
    "CYBR": "assault tripod",
    "SPID": "large technospider",
    "PLAY": "agent",
    "SSWV": "sailor",
}


def sprites(cache: Path, seed: int) -> Pool:
    """Freedoom's creatures from all sides, on plain grounds; every third animation frame is trained on."""
    rng = np.random.default_rng(seed)
    lumps = wad(fetch_wheel(VIZDOOM, cache).read("vizdoom/freedoom2.wad"))
    names = [name for name, _ in lumps]
    files = dict(lumps[names.index("S_START") : names.index("S_END")])
    palette = np.frombuffer(dict(lumps)["PLAYPAL"], np.uint8)[:768].reshape(256, 3)
    kept = sorted(name for name in files if name[:4] in CREATURES)
    frames = [ord(name[4]) - ord("A") for name in kept]
    return Pool(
        source="sprites",
        ids=[f"sprites/{name}" for name in kept],
        images=np.stack([sprite_image(*patch(files[name]), palette, rng) for name in kept]),
        labels=[CREATURES[name[:4]] for name in kept],
        splits=["task_test" if frame % 3 else "task_train" for frame in frames],
    )


def wad(content: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a WAD file's lumps, in order."""
    kind, count, start = struct.unpack_from("<4sii", content)
    require(kind in (b"IWAD", b"PWAD"), f"a WAD file that begins with {kind!r}")
    entries = struct.iter_unpack("<ii8s", content[start : start + 16 * count])
    return [
        (name.rstrip(b"\0").decode("ascii"), content[place : place + size])
        for place, size, name in entries
    ]


def patch(content: bytes) -> tuple[Pixels, Pixels]:
    """Decode a picture of columns: palette indices and a mask (255 where drawn), both [H, W]."""
    width, height = struct.unpack_from("<HH", content)
    colors, drawn = np.zeros((2, height, width), np.uint8)
    for column, place in enumerate(struct.unpack_from(f"<{width}I", content, 8)):
        while content[place] != 255:  # posts: top row, length, a byte unused, pixels, a byte unused
            top, length = content[place], content[place + 1]
            pixels = np.frombuffer(content, np.uint8, length, place + 3)
            colors[top : top + length, column] = pixels
            drawn[top : top + length, column] = 255
            place += length + 4
    return colors, drawn


def sprite_image(
    colors: Pixels, drawn: Pixels, palette: Pixels, rng: np.random.Generator
) -> Pixels:
    """A sprite on a ground of random color, [32, 32, 3]; its longer side fills the image."""
    height, width = colors.shape
    side = max(height, width)
    canvas = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    corner = ((side - width) // 2, (side - height) // 2)
    canvas.paste(Image.fromarray(palette[colors]), corner, Image.fromarray(drawn))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


# Textures

# A file in skimage/data, and the box (left, top, right, bottom) cut from it.
TEXTURES = {
    "brick": ("brick.png", None),
    "grass": ("grass.png", None),
    "gravel": ("gravel.png", None),
    "text": ("text.png", None),
    "coins": ("coins.png", None),
    "tissue": ("ihc.png", None),
    "galaxies": ("hubble_deep_field.jpg", None),
    "retina": ("retina.jpg", (350, 350, 1060, 1060)),
    "fur": ("chelsea.png", (60, 0, 330, 300)),
}
PATCHES = {"task_train": 110, "task_test": 220}  # of every texture


def textures(cache: Path, seed: int) -> Pool:
    """Gray patches of one photograph per class: training from its left half, test from its right."""
    rng = np.random.default_rng(seed)
    wheel = fetch_wheel(SCIKIT_IMAGE, cache)
    ids, images, labels, splits = [], [], [], []
    for label, (file, box) in TEXTURES.items():
        photo = Image.open(io.BytesIO(wheel.read(f"skimage/data/{file}")))
        gray = np.asarray(photo.convert("L").crop(box or (0, 0, *photo.size)))
        half = gray.shape[1] // 2
        for split, area in (("task_train", gray[:, :half]), ("task_test", gray[:, half:])):
            images += [texture_image(area, rng) for _ in range(PATCHES[split])]
            ids += [f"textures/{label}/{split}/{number:03d}" for number in range(PATCHES[split])]
            labels += [label] * PATCHES[split]
            splits += [split] * PATCHES[split]
    return Pool("textures", ids, np.stack(images), labels, splits)


def texture_image(area: Pixels, rng: np.random.Generator) -> Pixels:
    """A square of 40 to 80 pixels, turned by quarters, at a random brightness and contrast."""
    side = int(rng.integers(40, 81))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in area.shape)
    square = np.rot90(area[top : top + side, left : left + side], int(rng.integers(4)))
    small = np.asarray(
        Image.fromarray(square).resize((SIZE, SIZE), Image.Resampling.LANCZOS), float
    )
    spread = max(small.std(), 1.0)
    image = rng.uniform(90, 165) + (small - small.mean()) * rng.uniform(25, 55) / spread
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
