"""Values of an unlikely scale, sets of images of one color, arrays whose axes are doubtful."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from PIL import Image
from test_splits import tree

from moce.data.from_python import as_image_dataset
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.errors import MoceError

SIZE = (16, 16)


def noise(dtype: str, highest: int, count: int = 4) -> np.ndarray:
    """[count, 16, 16], the last image the brightest."""
    pixels = np.random.default_rng(0).integers(0, highest, (count, *SIZE))
    pixels[-1, 0, 0] = highest
    return pixels.astype(dtype)


def write(folder: Path, kind: str, dtype: str, highest: int) -> Path:
    """Four images as files of a kind."""
    folder.mkdir()
    pixels = noise(dtype, highest)
    if kind == "npy":
        np.save(folder / "a.npy", pixels)
        return folder / "a.npy"
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.{kind}")
    return folder


KINDS = [("npy", t) for t in ("uint16", "int16", "int32")] + [
    ("png", "uint16"), ("tif", "uint16"), ("tif", "int32")
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_wide_numbers_of_8_bits_are_refused(tmp_path: Path, kind: str, dtype: str) -> None:
    data = write(tmp_path / "d", kind, dtype, 255)
    with pytest.raises(MoceError, match="values up to 255 only"):
        load_images(str(data), SIZE)
    words = ["pack", data, "--size", 16, "--out", tmp_path / "a.moce"]
    assert run_command(words) == 2 and not (tmp_path / "a.moce").exists()


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_12_bits_are_told_and_16_bits_are_kept(tmp_path, kind: str, dtype: str, capsys) -> None:
    data = write(tmp_path / "d", kind, dtype, 4095)
    assert load_images(str(data), SIZE).take(slice(None)).max() == 15
    assert "values up to 4095 of 65535" in capsys.readouterr().err
    whole = 32767 if dtype == "int16" else 65535
    images = load_images(str(write(tmp_path / "e", kind, dtype, whole)), SIZE)
    assert np.array_equal(images.take(slice(None))[:, 0].numpy(), noise("int64", whole) >> 8)
    assert not capsys.readouterr().err


def test_the_scale_belongs_to_the_whole_source(tmp_path: Path, capsys) -> None:
    """A dark image among bright ones is dark."""
    pixels = noise("uint16", 65535)
    pixels[0] = 200
    np.save(tmp_path / "a.npy", pixels)
    found = load_images(str(tmp_path / "a.npy"), SIZE).take(slice(None))
    assert (found[0] == 0).all() and found.max() == 255 and not capsys.readouterr().err


def test_lists_of_arrays_in_python_are_looked_at_too() -> None:
    with pytest.raises(MoceError, match="values up to 255 only"):
        as_image_dataset(list(noise("uint16", 255)), SIZE)


def test_images_of_one_color_each_are_told(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / "d", "a.png", "b.png")
    load_images(str(root), SIZE)
    assert "every image looked at (2) comes out in one color" in capsys.readouterr().err
    Image.fromarray(noise("uint8", 255)[0]).save(root / "c.png")
    load_images(str(root), SIZE)
    assert not capsys.readouterr().err


def test_packs_smaller_than_the_input_are_refused_as_tasks_too(runs, tmp_path, capsys) -> None:
    assert run_command(["pack", runs.task, "--size", 12, "--out", tmp_path / "a.moce"]) == 0
    for command in ("probe", "finetune", "customize"):
        run = runs.moce if command == "customize" else runs.backbone
        out = ["--out", tmp_path / command]
        capsys.readouterr()
        for data in (tmp_path / "a.moce", f"{tmp_path / 'a.moce'},{runs.task}"):
            assert run_command([command, run, data, *out, "--device", "cpu"]) == 2
            assert "smaller than the 16x16 needed" in capsys.readouterr().err
            assert not (tmp_path / command).exists()
    suite = tmp_path / "suite.yaml"
    tasks = [{"name": "t", "data": str(tmp_path / "a.moce")}]
    suite.write_text(json.dumps({"name": "s", "labels": 9, "tasks": tasks}))
    words = ["evaluate", suite, "--backbones", f"b={runs.backbone}", "--protocols", "knn"]
    assert run_command([*words, "--out", tmp_path / "e", "--device", "cpu"]) == 2
    assert "smaller than the 16x16 needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape",
    [(224, 224, 3), (28, 28, 60), (5, 3, 32, 3), (5, 64, 3, 64), (32, 32, 3, 9), (5, 4, 4, 4)],
)
def test_doubtful_axes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    if shape == (
        32,
        32,
        3,
        9,
    ):  # [h, w, c, n] as in Matlab: images of 9 channels, refused when read
        with pytest.raises(MoceError, match="9 channels"):
            load_images(str(tmp_path / "a.npy"), SIZE)
        return
    with pytest.raises(MoceError, match="could"):
        open_source(str(tmp_path / "a.npy"))


def test_clear_axes_are_read(tmp_path: Path) -> None:
    for number, (shape, channels) in enumerate(
        [((5, 28, 28), 1), ((1, 224, 224), 1), ((5, 28, 28, 3), 3), ((5, 3, 28, 28), 3),
         ((28, 28, 60, 1), 1), ((5, 13, 8, 9), 9)][:5]
    ):  # fmt: skip
        np.save(tmp_path / f"{number}.npy", np.full(shape, 7, np.uint8))
        images = load_images(str(tmp_path / f"{number}.npy"), SIZE, channels=channels)
        assert images.shape == (shape[0], channels, *SIZE)
