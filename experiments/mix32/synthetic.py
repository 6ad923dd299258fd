"""Task images that are made here: colored digits and rendered letters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tools.image_sources import SIZE, Pixels, Pool

PER_LETTER = 120
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Text faces that matplotlib carries (the others hold symbols only).
FACES = {"DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralBol"} | {
    "cmb10",
    "cmr10",
    "cmss10",
    "cmtt10",
}


def colored(digits: Pool, seed: int) -> Pool:
    """Gray digits in a random ink on a random ground, as unlike each other as the colors allow."""
    rng = np.random.default_rng(seed)
    gray = digits.images[..., None].astype(np.float32) / 255
    ground = rng.integers(0, 256, (len(gray), 1, 1, 3)).astype(np.float32)
    ink = (ground + rng.integers(90, 167, ground.shape)) % 256  # at least a third of the way round
    images = np.rint(ground + (ink - ground) * gray).astype(np.uint8)
    ids = [f"colored_{name}" for name in digits.ids]
    return replace(digits, source="colored_mnist", ids=ids, images=images)


def rendered_letters(seed: int) -> Pool:
    """Capital letters in many typefaces, sizes, angles and contrasts, light on dark or the reverse."""
    rng = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted(p for p in folder.glob("*.ttf") if p.stem.split("-")[0] in FACES)
    labels = [letter for letter in LETTERS for _ in range(PER_LETTER)]
    return Pool(
        source="letters",
        ids=[f"letters/{number:05d}" for number in range(len(labels))],
        images=np.stack([letter_image(letter, fonts, rng) for letter in labels]),
        labels=labels,
        splits=["test"] * len(labels),
    )


def letter_image(letter: str, fonts: list[Path], rng: np.random.Generator) -> Pixels:
    """One letter, gray [32, 32], drawn four times as large and reduced."""
    side = 4 * SIZE
    font = ImageFont.truetype(fonts[rng.integers(len(fonts))], int(rng.integers(64, 109)))
    ground, ink = rng.permutation([rng.integers(0, 90), rng.integers(166, 256)]).tolist()
    image = Image.new("L", (side, side), ground)
    middle = (side / 2 + rng.integers(-12, 13), side / 2 + rng.integers(-12, 13))
    ImageDraw.Draw(image).text(middle, letter, fill=ink, font=font, anchor="mm")
    image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, fillcolor=ground)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
