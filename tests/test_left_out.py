"""What is no image, and says so: hidden and system entries, formats that are not read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import RUNTIME, picture
from test_splits import shard, tree

import moce
from moce.data.from_python import as_image_dataset
from moce.data.readers.factory import open_source
from moce.data.readers.left_out import hidden_part

HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.png",
    "cat/@eaDir/a.png",
    "__MACOSX/cat/._a.png",
    "cat/._a.png",
    "cat/.trash/a.png",
    "$RECYCLE.BIN/a.png",
]


def ids(data: object) -> list[str]:
    return [sample.id for sample in open_source(str(data))]


def test_names_of_hidden_entries() -> None:
    assert hidden_part("cat/.git/a.png") == "cat/.git"
    assert hidden_part("cat/Thumbs.db") == "cat/Thumbs.db"
    assert [hidden_part(name) for name in ("./a.png", "a..b/c.png", "cat/a.png")] == [None] * 3


def test_hidden_entries_of_a_folder_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / ".photos", "cat/a.png", *HIDDEN)
    (root / "Thumbs.db").write_bytes(b"x")
    (root / "cat" / "desktop.ini").write_bytes(b"x")
    assert ids(root) == ["cat/a.png"]
    message = capsys.readouterr().err
    assert "left out: 8 hidden or system entries (such as $RECYCLE.BIN)" in message


def test_hidden_entries_of_a_tar_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    path = shard(tmp_path / "a.tar", "./cat/a.png", *HIDDEN)
    assert ids(path) == ["a/cat/a.png"]
    assert "left out: 6 hidden or system entries" in capsys.readouterr().err


def test_hidden_lines_of_a_list_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / ".cache", "a.png", "b.png", "._a.png", ".b.png", "@eaDir/a.png")
    lines = ["a.png", "._a.png", ".b.png", f"{root}/@eaDir/a.png", f"{root}/b.png"]
    (root / "list.txt").write_text("\n".join(lines))
    assert ids(f"@{root}/list.txt") == ["a.png", f"{root}/b.png"]
    assert "left out: 3 hidden or system entries" in capsys.readouterr().err
    found = as_image_dataset([root / "a.png", root / "._a.png"], (16, 16))
    assert found.ids == [str(root / "a.png")]
    assert "left out: 1 hidden or system entry (._a.png)" in capsys.readouterr().err


def test_hidden_members_of_an_archive_of_arrays_are_no_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 9, 9), np.uint8), **{"__MACOSX/x": [1]})
    assert ids(tmp_path / "a.npz") == ["0", "1"]


def test_files_that_look_like_images_are_counted_and_named(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / "d", "a.png")
    for name in ("a.CR2", "b.cr2", "c.svg", "d.tar", "labels.npy", "notes.txt"):
        (root / name).write_bytes(b"x")
    assert ids(root) == ["a.png"]
    message = capsys.readouterr().err
    assert "left out: 2 .cr2, 1 .npy, 1 .svg, 1 .tar\n" in message


@pytest.mark.parametrize(
    "suffix", ["jfif", "jpe", "ppm", "pgm", "jp2", "tga", "dib", "avif", "JPG", "apng"]
)
def test_other_suffixes_are_opened(tmp_path: Path, suffix: str) -> None:
    from moce.data.load import load_images

    kind = {"jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM", "jp2": "JPEG2000", "jpg": "JPEG"}
    mode = "L" if suffix == "pgm" else "RGB"
    name = kind.get(suffix.lower(), "PNG" if suffix == "apng" else suffix.upper())
    picture((200, 30, 60), mode=mode).save(tmp_path / f"a.{suffix}", name)
    means = load_images(str(tmp_path), (16, 16)).pixels[0].float().mean(dim=(1, 2)).numpy()
    assert np.abs(means - ([84] * 3 if mode == "L" else [200, 30, 60])).max() < 12


def test_heic_is_opened_with_its_plugin_and_counted_without(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    from moce.data import formats
    from moce.data.load import load_images

    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture((200, 30, 60), size=(64, 64))).save(tmp_path / "a.HEIC")
    picture().save(tmp_path / "b.png")
    images = load_images(str(tmp_path), (16, 16))
    assert images.ids == ["a.HEIC", "b.png"]
    assert np.abs(images.pixels[0].float().mean(dim=(1, 2)).numpy() - [200, 30, 60]).max() < 12
    monkeypatch.setattr(formats, "_has_heif", lambda: False)
    formats.suffixes.cache_clear()
    try:
        assert ids(tmp_path) == ["b.png"]
    finally:
        formats.suffixes.cache_clear()
    assert "left out: 1 .heic (to read them: pip install 'moce[heic]')" in capsys.readouterr().err


def test_unreadable_images_are_named_where_no_folder_is_written(runs, tmp_path, capsys) -> None:
    root = tmp_path / "task"
    shutil.copytree(runs.task, root)
    label = next((root / "train").iterdir()).name
    (root / "train" / label / "bad.png").write_bytes(b"no image")
    said = f"skipped train/{label}/bad.png: ValueError: not an image"
    moce.probe(runs.mae, root, kind="knn", **RUNTIME)
    assert said in capsys.readouterr().err
    moce.load(runs.moce).select(root)
    assert said in capsys.readouterr().err
