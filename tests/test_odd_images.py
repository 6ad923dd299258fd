"""Unusual and broken image files: PngSuite against another decoder, and the files Pillow is tested on."""

from __future__ import annotations

import importlib
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from builders import picture
from PIL import Image

from moce.data.decode import open_encoded, to_pixels
from moce.data.load import load_images

CACHE = Path("~/.cache/moce-tests").expanduser()


def source_of(package: str) -> Path:
    """The unpacked source distribution of a package, downloaded once; skips without a network."""
    folder = CACHE / package
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--no-binary",
                   ":all:", "--quiet", "--dest", str(CACHE)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        archives = sorted(CACHE.glob(f"{package.split('=')[0]}-*.tar.gz"))
        if not archives:
            pytest.skip(f"cannot download {package}: {done.stderr.strip()[-200:]}")
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture
def suite() -> tuple[dict[str, bytes], ModuleType]:
    """PngSuite by name, and a decoder in pure Python: both come with pypng (MIT)."""
    code = source_of("pypng==0.20220715.0") / "code"
    sys.path.insert(0, str(code))
    try:
        return importlib.import_module("pngsuite").png, importlib.import_module("png")
    finally:
        sys.path.remove(str(code))


@pytest.mark.slow
def test_pngsuite_is_decoded_as_by_another_decoder(suite) -> None:
    files, reference = suite
    compared = 0
    for name, content in files.items():
        if name.startswith("x") or b"sBIT" in content:  # broken on purpose; scaled by it there
            continue
        width, height, rows, _ = reference.Reader(bytes=content).asRGBA8()
        rgba = np.array([list(row) for row in rows], float).reshape(height, width, 4)
        alpha = rgba[..., 3:] / 255
        expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
        found = to_pixels(open_encoded(content), (height, width)).transpose(1, 2, 0)
        assert np.abs(found - expected).max() <= 1.01, name
        compared += 1
    assert compared >= 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_files_pillow_is_tested_on_do_no_harm() -> None:
    """Some 700 files, many broken or made to harm: read or listed, in seconds, none fatal."""
    folder = source_of("pillow==12.0.0") / "Tests" / "images"
    images = load_images(str(folder), (32, 32))
    assert len(images) > 600 and 20 < len(images.skipped) < 60
    reasons = dict(images.skipped)
    for name in ("decompression_bomb.gif", "libtiff_segfault.tif", "truncated_jpeg.jpg",
                 "broken.png", "bmp/b/badbitcount.bmp"):  # fmt: skip
        assert reasons[name], name
    for name in images.ids:
        assert not name.endswith((".eps", ".ps", ".pdf"))


@pytest.mark.slow
def test_odd_bmps_look_as_their_references() -> None:
    folder = source_of("pillow==12.0.0") / "Tests" / "images" / "bmp"
    compared = 0
    for path in sorted((folder / "html").glob("*.png")):
        same = folder / "g" / f"{path.stem}.bmp"
        if same.is_file():
            size = Image.open(path).size[::-1]
            ours, theirs = (to_pixels(open_encoded(p), size).astype(int) for p in (same, path))
            assert np.abs(ours - theirs).max() <= 8, path.stem  # rounding of 5-bit colors
            compared += 1
    assert compared >= 8


# --- made here ------------------------------------------------------------------------------------


def test_programs_called_images_are_not_run(tmp_path: Path) -> None:
    """Pillow passes PostScript to Ghostscript, whatever the file's name."""
    picture().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    images = load_images(str(tmp_path), (16, 16))
    assert images.ids == ["b.png"]
    assert images.skipped == [("a.png", "ValueError: not an image, or of an unsupported format")]


def raw_png(depth: int, color_type: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of 16 equal rows, 16 pixels wide, with a transparent color."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    header = struct.pack(">IIBBBBB", 16, 16, depth, color_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 16)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("content", "dark"),
    [
        (raw_png(1, 0, b"\x00\xff", b"\0\0"), None),
        (raw_png(4, 0, b"\x77" * 4 + b"\x33" * 4, b"\0\7"), 0x33),
        (raw_png(8, 0, b"\x77" * 8 + b"\x33" * 8, b"\0\x77"), 0x33),
        (raw_png(16, 0, b"\x77\x01" * 8 + b"\x77\x02" * 8, b"\x77\x01"), 0x77),
        (raw_png(16, 2, b"\x77\x01" * 24 + b"\x33\x02" * 24, b"\x77\x01" * 3), 0x33),
    ],
)
def test_a_transparent_color_is_white_at_any_depth(content: bytes, dark: int | None) -> None:
    pixels = to_pixels(open_encoded(content), (16, 16))
    assert (pixels[:, :, :8] == 255).all()
    assert (pixels[:, :, 8:] == (255 if dark is None else dark)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "tiff"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    picture((200, 30, 60)).save(tmp_path / f"a.{suffix}")
    found = load_images(str(tmp_path), (16, 16)).pixels[0].float().mean(dim=(1, 2))
    assert np.abs(found.numpy() - [200, 30, 60]).max() < 12


def test_the_first_frame_of_a_moving_image_is_read(tmp_path: Path) -> None:
    frames = [picture((200, 30, 60)), picture((0, 0, 255))]
    for suffix in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    means = load_images(str(tmp_path), (16, 16)).pixels.float().mean(dim=(2, 3))
    assert np.abs(means.numpy() - [200, 30, 60]).max() < 12


def test_floats_in_a_tiff(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))
    Image.fromarray(ramp).save(tmp_path / "good.tif")
    Image.fromarray(ramp * 255).save(tmp_path / "unclear.tif")
    images = load_images(str(tmp_path), (16, 16))
    assert images.ids == ["good.tif"] and "0..1" in images.skipped[0][1]
    assert np.array_equal(
        images.take(slice(None))[0, 1, 0].numpy(), np.round(ramp[0] * 255).astype(np.uint8)
    )


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_in_either_byte_order(tmp_path: Path, order: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(order)
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=order[0])
    np.save(tmp_path / "a.npy", pixels[None])
    for data in (tmp_path, tmp_path / "a.npy"):
        found = load_images(str(data), (16, 16)).pixels[0, 0].numpy()
        assert np.array_equal(found, (pixels >> 8).astype(np.uint8))


def test_a_picture_with_broken_metadata_is_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05junk")
    assert load_images(str(tmp_path), (16, 16)).ids == ["a.jpg"]
