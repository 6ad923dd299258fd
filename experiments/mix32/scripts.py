"""Held-out tasks of characters in scripts and handwriting: training and test typefaces are apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tools.image_sources import SIZE, Pixels, Pool

from experiments.mix32.typefaces import Face, faces

IMAGES = {"task_train": 1000, "task_test": 2000}
SIDE = 4 * SIZE  # characters are drawn four times as large and reduced


@dataclass(frozen=True)
class Script:
    """A task: its characters are the classes."""

    subset: str  # of the font packages
    characters: str
    train: tuple[str, ...]  # families
    test: tuple[str, ...]
    paper: bool = False  # dark colored ink on light paper, not gray in either contrast


SCRIPTS = {
    "hebrew": Script(
        "hebrew",
        "אבגדהוזחטיכלמנסעפצקרשת",
        ("heebo", "frank-ruhl-libre", "suez-one", "varela-round", "noto-sans-hebrew"),
        ("rubik", "assistant", "amatic-sc", "cousine", "tinos", "fredoka", "open-sans"),
    ),
    "arabic": Script(
        "arabic",
        "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
        ("amiri", "almarai", "changa", "lemonada", "noto-kufi-arabic", "vazirmatn"),
        ("aref-ruqaa", "cairo", "lateef", "noto-naskh-arabic", "lalezar", "reem-kufi"),
    ),
    "devanagari": Script(
        "devanagari",
        "कखगघङचछजझञटठडढणतथदधनपफबभमयरलवशषसह",
        ("hind", "martel", "khand", "modak", "kalam"),
        ("baloo-2", "noto-sans-devanagari", "inknut-antiqua", "yantramanav", "rajdhani"),
    ),
    "hiragana": Script(
        "japanese",
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもらりるれろ",
        ("yomogi", "kiwi-maru", "dela-gothic-one", "kosugi-maru", "zen-old-mincho"),
        (
            "yusei-magic",
            "kaisei-opti",
            "mochiy-pop-one",
            "dotgothic16",
            "zen-kurenaido",
            "sawarabi-gothic",
        ),
    ),
    "handwriting": Script(
        "latin",
        "abcdefghijklmnopqrstuvwxyz",
        (
            "caveat",
            "indie-flower",
            "patrick-hand",
            "reenie-beanie",
            "homemade-apple",
            "permanent-marker",
        ),
        (
            "shadows-into-light",
            "architects-daughter",
            "gochi-hand",
            "rock-salt",
            "schoolbell",
            "gloria-hallelujah",
        ),
        paper=True,
    ),
}


def script_pool(name: str, archives: Path, seed: int) -> Pool:
    """Images of a script's characters: as many of each, in families drawn alike."""
    script = SCRIPTS[name]
    rng = np.random.default_rng(seed)
    images: list[Pixels] = []
    labels: list[str] = []
    splits: list[str] = []
    for split, families in (("task_train", script.train), ("task_test", script.test)):
        found = faces(archives, families, script.subset, script.characters)
        each = IMAGES[split] // len(script.characters)
        drawn = [character for character in script.characters for _ in range(each)]
        images += [character_image(c, script, pick(found, rng), rng) for c in drawn]
        labels += drawn
        splits += [split] * len(drawn)
    ids = [f"{name}/{split}/{number:05d}" for number, split in enumerate(splits)]
    return Pool(name, ids, np.stack(images), labels, splits)


def pick(found: list[Face], rng: np.random.Generator) -> Face:
    """A font of a random family, so that families of many weights are not drawn more often."""
    families = sorted({face.family for face in found})
    family = families[rng.integers(len(families))]
    own = [face for face in found if face.family == family]
    return own[rng.integers(len(own))]


def character_image(character: str, script: Script, face: Face, rng: np.random.Generator) -> Pixels:
    """One character, gray or RGB, of random size, angle, place and contrast."""
    mask = character_mask(character, script.characters, face, rng)
    if script.paper:
        ground, ink = rng.integers(200, 256, 3), rng.integers(0, 110, 3)
    else:
        ground, ink = rng.permutation([rng.integers(0, 90), rng.integers(166, 256)])[:, None]
    image = ground + (ink - ground) * (mask[..., None] / 255)
    image = np.rint(image).astype(np.uint8)
    return image if script.paper else image[..., 0]


def character_mask(character: str, alphabet: str, face: Face, rng: np.random.Generator) -> Pixels:
    """The ink of a character, [32, 32]: sizes within an alphabet are kept, its tallest fills most."""
    extent, middle = alphabet_size(face, alphabet)
    size = int(rng.uniform(0.7, 0.95) * SIDE / extent)
    font = face.at(size)
    left, _, right, _ = font.getbbox(character, anchor="ls")
    across, down = rng.integers(-8, 9, 2)
    place = (SIDE / 2 - (left + right) / 2 + across, SIDE / 2 - middle * size + down)
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


@cache
def alphabet_size(face: Face, alphabet: str) -> tuple[float, float]:
    """The largest extent of its characters, and their middle below the baseline, at size 1."""
    font = face.at(100)
    left, top, right, bottom = np.array([font.getbbox(c, anchor="ls") for c in alphabet]).T
    extent = max(bottom.max() - top.min(), (right - left).max())
    return float(extent) / 100, float(bottom.max() + top.min()) / 200
