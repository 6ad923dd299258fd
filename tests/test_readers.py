"""Readers: lists, single files, arrays, tar shards, Hugging Face; unusual and hostile ones."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from builders import PRETRAIN, RUNTIME, middle, picture
from PIL import Image

import moce
from moce.config import PretrainSettings
from moce.data.from_python import as_image_dataset
from moce.data.load import load_images
from moce.data.readers.factory import is_named, located, open_source, paths_of, sources_of
from moce.data.readers.table import (
    FileTable,
    SampleTable,
    ids_of,
    labels_and_splits,
    select,
)
from moce.data.readers.tar import expand_braces
from moce.errors import MoceError

SIZE = (16, 16)
COLORS = [(200, 30, 60), (10, 220, 90), (5, 6, 240)]


def png(color) -> bytes:
    buffer = io.BytesIO()
    picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, color=COLORS[0]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(color))
    return path


def ids(data: object) -> list[str]:
    return [sample.id for sample in open_source(str(data))]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- several sources ------------------------------------------------------------------------------


def test_several_sources_put_their_names_before_identities(tmp_path: Path) -> None:
    put(tmp_path / "cats" / "a.png"), put(tmp_path / "dogs" / "a.png", COLORS[1])
    both = f"{tmp_path}/cats,{tmp_path}/dogs/"
    assert ids(both) == ["cats/a.png", "dogs/a.png"]
    images = load_images(both, SIZE)
    assert [tuple(middle(pixels)) for pixels in images.pixels] == COLORS[:2]
    assert ids(f"{tmp_path}/cats") == ["a.png"]


def test_sources_of_one_name_are_told_apart_by_more_of_their_paths(tmp_path: Path) -> None:
    put(tmp_path / "x" / "photos" / "a.png"), put(tmp_path / "y" / "photos" / "a.png")
    assert ids(f"{tmp_path}/x/photos,{tmp_path}/y/photos") == ["x/photos/a.png", "y/photos/a.png"]


def test_a_list_names_sources_from_its_own_folder(tmp_path: Path, monkeypatch) -> None:
    put(tmp_path / "in" / "cats" / "a.png"), put(tmp_path / "in" / "one.png", COLORS[1])
    (tmp_path / "in" / "all.txt").write_text("# mine\ncats\n\none.png\n")
    assert ids(f"@{tmp_path}/in/all.txt") == ["cats/a.png", "one.png"]
    monkeypatch.chdir(tmp_path / "in")
    assert ids("@all.txt") == ["cats/a.png", "one.png"]  # wherever it is read from


def test_ids_of_single_files_are_their_paths_as_written(tmp_path: Path, monkeypatch) -> None:
    put(tmp_path / "a" / "1.png"), put(tmp_path / "b" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert ids("a/1.png,b/1.png") == ["a/1.png", "b/1.png"]
    assert ids("a/1.png") == ["a/1.png"]


def test_a_folder_with_a_comma_in_its_name_is_one_source(tmp_path: Path) -> None:
    put(tmp_path / "cats, dogs" / "a.png")
    assert ids(tmp_path / "cats, dogs") == ["a.png"]


@pytest.mark.parametrize("data", ["a,,b", "a,a", "@missing.txt", "a,missing", "x" * 5000])
def test_lists_that_make_no_sense_are_refused(tmp_path: Path, monkeypatch, data: str) -> None:
    put(tmp_path / "a" / "1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoceError):
        open_source(data)


def test_python_lists_become_one_argument(tmp_path: Path) -> None:
    def data(value: object) -> str:
        return PretrainSettings(data=value, out=tmp_path).data

    assert data(["a", Path("b")]) == "a,b" and data(Path("a")) == "a"
    with pytest.raises(ValueError, match="comma"):
        data(["a,b", "c"])


def test_lists_of_sources_and_images_in_python(tmp_path: Path) -> None:
    put(tmp_path / "cats" / "a.png"), put(tmp_path / "dogs" / "a.png")
    found = as_image_dataset([tmp_path / "cats", tmp_path / "dogs"], SIZE)
    assert found.ids == ["cats/a.png", "dogs/a.png"]
    assert len(as_image_dataset([np.zeros((9, 9, 3), np.uint8), picture()], SIZE)) == 2


def test_relative_sources_of_a_suite_start_from_its_root(tmp_path: Path) -> None:
    assert located("demo:digits", tmp_path) == "demo:digits"
    assert located("a,hf:x,@l.txt", tmp_path) == f"{tmp_path}/a,hf:x,@{tmp_path}/l.txt"
    assert paths_of("a,demo:digits,s-{0..1}.tar") == [Path("a"), Path("s-0.tar"), Path("s-1.tar")]
    assert is_named("hf:x") and not is_named("photos")
    assert [source.data for source in sources_of("s-{a,b}.tar")] == ["s-{a,b}.tar"]


# --- folders --------------------------------------------------------------------------------------


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a" / "1.png"), put(tmp_path / "far" / "2.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    images = load_images(str(tmp_path / "data"), SIZE)
    assert images.ids == ["a/1.png", "linked/2.png"]
    assert [name for name, _ in images.skipped] == ["gone.png"]


def test_a_folder_of_npy_files_has_one_image_each(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((20, 24, 5), 7, np.uint8))
    np.save(tmp_path / "b.npy", np.full((5, 20, 24), 8, np.uint8))
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object))
    images = load_images(str(tmp_path), SIZE, channels=5)
    assert images.ids == ["a.npy", "b.npy"] and images.take(slice(None))[
        :, :, 0, 0
    ].unique().tolist() == [
        7,
        8,
    ]
    put(tmp_path / "d.png")  # beside images they are something else
    assert ids(tmp_path) == ["d.png"]


# --- arrays ---------------------------------------------------------------------------------------


def test_npz_with_labels_ids_and_splits(tmp_path: Path) -> None:
    pixels = np.arange(3 * 16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16, 3)
    np.savez(tmp_path / "a.npz", images=pixels, labels=[[1], [0], [1]], ids=list("xyz"),
             splits=["train", "train", "val"])  # fmt: skip
    images = load_images(str(tmp_path / "a.npz"), SIZE)
    assert np.array_equal(images.pixels.numpy(), pixels.transpose(0, 3, 1, 2))
    assert (images.ids, images.labels) == (["x", "y", "z"], ["1", "0", "1"])
    assert images.splits == ["train", "train", "val"]


def test_npz_with_an_array_per_split(tmp_path: Path) -> None:
    pixels = np.zeros((2, 28, 28), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=[0, 1], test_images=pixels[:1],
             test_labels=[1])  # fmt: skip
    found = open_source(str(tmp_path / "a.npz"))
    assert [(e.id, e.label, e.split) for e in found] == [
        ("train/0", "0", "train"), ("train/1", "1", "train"), ("test/0", "1", "test")]  # fmt: skip


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4)), np.array([{}]), np.zeros((2, 4, 4), "complex64"), np.zeros((0, 4, 4))],
)
def test_arrays_that_hold_no_images_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(MoceError, match=r"a\.npy"):
        open_source(str(tmp_path / "a.npy"))


def test_integers_of_unknown_scale_are_refused_with_the_remedy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.int64))
    with pytest.raises(MoceError, match="uint8"):
        load_images(str(tmp_path / "a.npy"), SIZE)


# --- tar ------------------------------------------------------------------------------------------


def test_brace_patterns() -> None:
    assert expand_braces("s-{008..010}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert expand_braces("{a,b}-{9..10}.tar") == ["a-10.tar", "a-9.tar", "b-10.tar", "b-9.tar"]
    with pytest.raises(MoceError, match="more than"):
        expand_braces("s-{0..99999999999}.tar")


def test_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    for number, color in enumerate(COLORS):
        members = {"x/1.png": png(color), "x/1.cls": b"7\n", "x/1.json": b"{}", "2.png": b"junk"}
        tar(tmp_path / f"s-{number:03d}.tar", members)
    images = load_images(f"{tmp_path}/s-{{000..002}}.tar", SIZE)
    assert images.ids == ["s-000/x/1.png", "s-001/x/1.png", "s-002/x/1.png"]
    assert images.labels == ["7"] * 3
    assert [tuple(middle(pixels)) for pixels in images.take(slice(None))] == COLORS
    assert [name for name, _ in images.skipped] == ["s-000/2.png", "s-001/2.png", "s-002/2.png"]
    assert ids(f"{tmp_path}/s-*.tar") == ids(f"{tmp_path}/s-{{000..002}}.tar")
    assert ids(f"{tmp_path}/s-001.tar") == ["s-001/x/1.png", "s-001/2.png"]
    with pytest.raises(MoceError, match="s-003"):
        open_source(f"{tmp_path}/s-{{000..003}}.tar")


def test_folders_in_a_tar_are_classes_and_splits(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"./train/cat/1.png": b"", "val/dog/2.png": b""})
    found = [(e.id, e.label, e.split) for e in open_source(str(path))]
    assert found == [("a/train/cat/1.png", "cat", "train"), ("a/val/dog/2.png", "dog", "val")]


def test_names_that_lead_out_of_an_archive_are_listed_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    members = {
        "../evil.png": png(COLORS[0]),
        "/evil.png": png(COLORS[0]),
        "ok.png": png(COLORS[1]),
    }
    path = tar(tmp_path / "in" / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    images = load_images(str(path), SIZE)
    assert images.ids == ["a/ok.png"]
    assert [name for name, _ in images.skipped] == ["a/../evil.png", "a//evil.png", "a/link.png"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_what_is_whole_of_a_broken_archive_is_read(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {f"{n}.png": png(COLORS[0]) * 9 for n in range(3)})
    path.write_bytes(path.read_bytes()[:2500])
    images = load_images(str(path), SIZE)
    assert images.ids[0] == "a/0.png" and images.skipped
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    with pytest.raises(MoceError, match="broken"):
        load_images(str(tmp_path / "junk.tar"), SIZE)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(MoceError, match="gunzip"):
        open_source(str(tmp_path / "z.tar"))


def test_images_behind_a_corrupt_header_of_an_archive_are_listed(tmp_path: Path) -> None:
    """tarfile takes it for the end."""
    path = tar(tmp_path / "a.tar", {f"{n}.png": png(COLORS[0]) for n in range(3)})
    whole = path.read_bytes()
    for content in (whole[:1024] + b"x" * 100 + whole[1124:], whole[:1124], whole[:1024]):
        path.write_bytes(content)
        images = load_images(str(path), SIZE)
        assert images.ids == ["a/0.png"] and "broken" in images.skipped[0][1]


# --- Hugging Face ---------------------------------------------------------------------------------


def test_saved_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"picture": [png(color) for color in COLORS], "label": [1, 0, 1]}
    train = datasets.Dataset.from_dict(rows, features=features)
    train.save_to_disk(str(tmp_path / "one"))
    images = load_images(str(tmp_path / "one"), SIZE)
    assert (images.ids, images.labels) == (["0", "1", "2"], ["dog", "cat", "dog"])
    assert [tuple(middle(pixels)) for pixels in images.pixels] == COLORS
    both = datasets.DatasetDict({"train": train, "test": train.select([2, 0])})
    both.save_to_disk(str(tmp_path / "both"))
    images = load_images(str(tmp_path / "both"), SIZE)
    assert images.ids == ["train/0", "train/1", "train/2", "test/0", "test/1"]
    assert images.splits == ["train"] * 3 + ["test"] * 2
    assert tuple(middle(images.pixels[3])) == COLORS[2]


def test_hugging_face_without_the_library_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    for data in (str(tmp_path), "hf:mnist:train"):
        with pytest.raises(MoceError, match=r"moce\[hf\]"):
            open_source(data)


# --- the largest share of skipped images ----------------------------------------------------------


def test_too_many_skipped_images_stop_the_run(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"junk")
    assert len(load_images(str(tmp_path), SIZE, max_skipped=0.5)) == 1
    with pytest.raises(MoceError, match=r"1 of the 2 .*--max-skipped"):
        load_images(str(tmp_path), SIZE, max_skipped=0.4)


def test_images_of_too_many_pixels_are_skipped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moce.data.decode.MOST_PIXELS", 300)
    put(tmp_path / "a.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "b.png")
    images = load_images(str(tmp_path), SIZE)
    assert images.ids == ["b.png"] and "more than 300" in images.skipped[0][1]


# --- from DATA to a run -----------------------------------------------------------------------


def test_a_tar_pattern_and_a_hugging_face_folder_are_pretrained_on(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for number, color in enumerate(COLORS):
        tar(tmp_path / f"s-{number}.tar", {f"{n}.png": png(color) for n in range(12)})
    rows = datasets.Dataset.from_dict({"image": [png(COLORS[0])] * 12})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    both = [f"{tmp_path}/s-{{0..2}}.tar", tmp_path / "saved"]
    run = moce.pretrain(both, out=tmp_path / "mae", epochs=1, **PRETRAIN)
    assert run.images == 48
    with pytest.raises(MoceError, match="holds the input data"):
        moce.pretrain([tmp_path / "mae" / "s.tar", "x"], out=tmp_path / "mae", overwrite=True)


def test_a_list_is_a_task(tmp_path: Path, runs) -> None:
    (tmp_path / "task.txt").write_text(f"{runs.task}\n")
    found = moce.probe(runs.mae, f"@{tmp_path}/task.txt", solver="lbfgs", **RUNTIME)
    same = moce.probe(runs.mae, runs.task, solver="lbfgs", **RUNTIME)
    assert found.values == same.values


def test_a_folder_is_kept_as_columns(tmp_path: Path) -> None:
    """A hundred bytes an image, and rows are the same however they are asked for."""
    for number in range(40):
        file = tmp_path / f"class {number % 4}" / f"image number {number:09d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("L", (number + 1, 3)).save(file)
    odd = os.fsencode(tmp_path) + b"/class 0/\xff.png"
    shutil.copy(file, odd)
    samples = open_source(str(tmp_path))
    assert isinstance(samples, FileTable)
    assert samples.nbytes <= 100 * len(samples)
    assert [samples[row] for row in range(len(samples))] == list(samples)
    assert samples[10].id == "class 0/\\xff.png"
    assert samples[10].open.read() == Path(os.fsdecode(odd)).read_bytes()  # type: ignore[attr-defined]
    rows = [1, 10, 12, 39]
    part = select(samples, rows)
    assert isinstance(part, FileTable)
    assert list(part) == [samples[row] for row in rows] == list(pickle.loads(pickle.dumps(part)))
    assert labels_and_splits(part) == ([samples[row].label for row in rows], [None] * 4)
    assert ids_of(part) == [samples[row].id for row in rows]


def test_rows_of_a_table_keep_their_bytes_and_files() -> None:
    table = SampleTable(
        pyarrow.array([*"abcdef"]),
        lambda row: bytes([row]),
        pyarrow.array([["x"], ["x", "y"], None, [], ["y"], ["x"]]),
        None,
        np.array([0, 2, 4, 6]),
    )
    part = select(table, [0, 1, 3, 5])
    assert isinstance(part, SampleTable) and part.first_rows is not None
    assert [sample.open.read() for sample in part] == [b"\0", b"\1", b"\3", b"\5"]  # type: ignore[attr-defined]
    assert part.first_rows.tolist() == [0, 2, 3, 4]
    assert labels_and_splits(part) == ([("x",), ("x", "y"), (), ("x",)], [None] * 4)
