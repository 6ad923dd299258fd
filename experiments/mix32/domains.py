"""Further domains for pre-training (recipe `wide`), from sources that no task uses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tools.image_sources import ANY_SPLIT, SIZE, Package, Pixels, Pool, fetch, members

from experiments.mix32.scripts import character_mask, pick
from experiments.mix32.typefaces import faces

# Public domain.
FLAGS = Package(
    "svg-country-flags",
    "1.2.10",
    "2576650b4568c8ee1a2a6ddaa45c0246be16735f229bb40b1a0a6f40424e5213",
)
# Silk icons by Mark James, CC BY 2.5.
SILK = Package(
    "famfamfam-silk", "1.0.0", "97197a1d1f00500c2588fff23740f332d1e1385720ed060e4485625347f78c70"
)
PER_FLAG = 6
# Characters in print: no task is drawn with these families.
ALPHABETS = {
    "latin": "ABDEFGHJKLMNPQRTUVXYZabdefghijkmnpqrtuy&?23456789",
    "cyrillic": "БГДЖЗИЛПФЦЧШЩЭЮЯбгджзилфцчшщэюя",
    "greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψω",
}
FAMILIES = {
    "latin": (
        "roboto",
        "source-serif-4",
        "ibm-plex-serif",
        "playfair-display",
        "special-elite",
        "oswald",
    ),
    "cyrillic": ("fira-sans", "ubuntu", "alegreya", "press-start-2p"),
    "greek": ("jura", "comfortaa", "fira-sans", "ubuntu"),
}
PER_ALPHABET = 2_000


def printed(cache: Path, seed: int) -> Pool:
    """Latin, Cyrillic and Greek characters in print, in a random ink on a random ground."""
    rng = np.random.default_rng(seed)
    images: list[Pixels] = []
    labels: list[str] = []
    for script, alphabet in ALPHABETS.items():
        found = faces(cache, FAMILIES[script], script, alphabet)
        for _ in range(PER_ALPHABET):
            character = alphabet[rng.integers(len(alphabet))]
            mask = character_mask(character, alphabet, pick(found, rng), rng)
            ground = rng.integers(0, 256, 3)
            ink = (ground + rng.integers(90, 167, 3)) % 256
            image = ground + (ink - ground) * (mask[..., None] / 255)
            images.append(np.rint(image).astype(np.uint8))
            labels.append(script)
    return whole_pool("printed", [f"{n:05d}" for n in range(len(labels))], images, labels)


def flags(cache: Path, seed: int) -> Pool:
    """Flags of countries, several random cuts of each."""
    rng = np.random.default_rng(seed)
    ids, images = [], []
    for name, content in sorted(members(fetch(FLAGS, cache), "png250px")):
        with Image.open(io.BytesIO(content)) as file:
            flag = file.convert("RGBA")
        for number in range(PER_FLAG):
            ids.append(f"{name.removesuffix('.png')}/{number}")
            images.append(flag_image(flag, rng))
    return whole_pool("flags", ids, images, [""] * len(ids))


def flag_image(flag: Image.Image, rng: np.random.Generator) -> Pixels:
    """A random cut of at least 60 % of each side, stretched to [32, 32, 3]."""
    extent = np.array(flag.size)
    kept = rng.uniform(0.6, 1, 2) * extent
    left, top = rng.uniform(0, 1, 2) * (extent - kept)
    canvas = Image.new("RGBA", flag.size, "white")
    canvas.alpha_composite(flag)
    box = (left, top, left + kept[0], top + kept[1])
    small = canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)
    return np.asarray(small)


def silk(cache: Path, seed: int) -> Pool:
    """Silk icons of 16x16 pixels, doubled, on a random light ground."""
    rng = np.random.default_rng(seed)
    ids, images = [], []
    for name, content in sorted(members(fetch(SILK, cache), "dist/png")):
        with Image.open(io.BytesIO(content)) as file:
            icon = file.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        canvas = Image.new("RGBA", icon.size, (*rng.integers(170, 256, 3).tolist(), 255))
        canvas.alpha_composite(icon)
        ids.append(name.removesuffix(".png"))
        images.append(np.asarray(canvas.convert("RGB")))
    return whole_pool("silk", ids, images, [""] * len(ids))


def whole_pool(source: str, ids: list[str], images: list[Pixels], labels: list[str]) -> Pool:
    """A source for pre-training only."""
    ids = [f"{source}/{name}" for name in ids]
    return Pool(source, ids, np.stack(images), labels, [ANY_SPLIT] * len(ids))
