"""Packed images as encoded: what is kept, who can open it, resumed to the byte, checked."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from builders import RUNTIME, customize, write_images, write_task
from conftest import Runs
from PIL import Image
from test_pack import same

import moce
from moce.cli import main
from moce.data.load import load_images
from moce.data.pack_shards import ShardWriter
from moce.data.readers.factory import open_source
from moce.data.readers.manifest import JOURNAL, MANIFEST, read_manifest
from moce.data.readers.table import SampleTable
from moce.errors import MoceError
from moce.evaluation.task import load_task

SIZE = (16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 images and two broken ones."""
    root = write_images(tmp_path_factory.mktemp("images") / "data", per_source=10)
    (root / "a_broken.png").write_bytes(b"junk")
    (root / "mnist" / "z_short.png").write_bytes((root / "mnist" / "0000.png").read_bytes()[:60])
    return root


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of 3 images, files of two or three of them."""
    monkeypatch.setattr("moce.data.pack_shards.GROUP_ROWS", 3)
    monkeypatch.setattr("moce.commands.pack.MEGABYTE", 2500)


PACK = {"shard_size": 1}


def photo(path: Path, size: tuple[int, int], **options) -> Path:
    """A JPEG of smooth random colors, or what the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image.save(path, **{"quality": 95, **options} if path.suffix == ".jpg" else options)
    return path


# --- what is kept ---------------------------------------------------------------------------------


def test_bytes_ids_labels_and_splits_are_those_of_the_folder(folder, tmp_path, small_shards):
    found = moce.pack(folder, out=tmp_path / "packed", **PACK)
    assert found.images == 40 and found.shards > 3 and len(found.skipped) == 2
    samples = {sample.id: sample for sample in open_source(str(tmp_path / "packed"))}
    for sample in open_source(str(folder)):
        if sample.id in samples:
            packed = samples[sample.id]
            assert packed.open.read() == (folder / sample.id).read_bytes()
            assert (packed.label, packed.split) == (sample.label, sample.split)
    assert {name for name, _ in found.skipped} == {"a_broken.png", "mnist/z_short.png"}
    assert same(load_images(str(tmp_path / "packed"), SIZE), load_images(str(folder), SIZE))


def test_each_image_is_read_alone_from_where_the_footer_says(folder, tmp_path, small_shards):
    moce.pack(folder, out=tmp_path / "packed", **PACK)
    samples = open_source(str(tmp_path / "packed"))
    assert isinstance(samples, SampleTable)
    assert all(file.offsets is not None for file in samples.reader.files)
    assert samples.nbytes <= 100 * len(samples)
    again = pickle.loads(pickle.dumps(samples))
    assert [s.open.read() for s in again] == [s.open.read() for s in samples]


def test_pandas_and_datasets_open_the_folder(folder, tmp_path, small_shards) -> None:
    moce.pack(folder, out=tmp_path / "packed", **PACK)
    expected = {sample.id: sample for sample in open_source(str(tmp_path / "packed"))}
    table = pandas.read_parquet(tmp_path / "packed")
    assert list(table.columns) == ["image", "id", "label", "split"]
    assert list(table["id"]) == list(expected)
    for row in table.itertuples():
        assert row.image["bytes"] == expected[row.id].open.read()
        assert row.image["path"] == Path(row.id).name and row.label == expected[row.id].label
    found = datasets.load_dataset(str(tmp_path / "packed"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(found["train"].features["image"], datasets.Image)
    assert found["train"]["id"][:] == list(expected)
    for row in found["train"]:
        assert np.array_equal(row["image"], expected[row["id"]].open())


def test_a_labeled_task_stays_one_and_several_labels_too(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    moce.pack(task, out=tmp_path / "packed")
    usual, packed = (load_task(str(tmp_path / name), (3, *SIZE)) for name in ("task", "packed"))
    assert packed.classes == usual.classes
    assert same(packed.train, usual.train) and same(packed.test, usual.test)
    rows = pq.read_table(tmp_path / "packed" / "images-00000.parquet").to_pylist()
    for row, label in zip(rows, [["a", "b"], [], None], strict=False):
        row["label"] = label
    kinds = datasets.Features(image=datasets.Image(), label=datasets.List(datasets.Value("string")))
    several = [{"image": row["image"], "label": row["label"]} for row in rows[:3]]
    datasets.Dataset.from_list(several, kinds).to_parquet(tmp_path / "several.parquet")
    moce.pack(tmp_path / "several.parquet", out=tmp_path / "again")
    labels = [sample.label for sample in open_source(str(tmp_path / "again"))]
    assert labels == [("a", "b"), (), None]
    datasets.load_dataset(str(tmp_path / "again"), cache_dir=str(tmp_path / "cache"))


def test_large_images_become_jpegs_of_the_shorter_side_and_small_ones_stay(tmp_path: Path) -> None:
    data = tmp_path / "data"
    wide, tall = photo(data / "wide.jpg", (400, 100)), photo(data / "tall.png", (90, 300))
    small = photo(data / "small.png", (50, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = photo(data / "turned.jpg", (300, 90), exif=exif)
    found = moce.pack(data, shorter_side=64, quality=95, out=tmp_path / "packed")
    assert "shorter side" in found.made and "quality 95" in found.made and "4:2:0" in found.made
    samples = {sample.id: sample.open for sample in open_source(str(tmp_path / "packed"))}
    sizes = {name: (opened().size, opened().format) for name, opened in samples.items()}
    assert sizes == {
        "small.png": ((50, 64), "PNG"),
        "tall.png": ((64, 213), "JPEG"),
        "turned.jpg": ((64, 213), "JPEG"),
        "wide.jpg": ((256, 64), "JPEG"),
    }
    assert samples["small.png"].read() == small.read_bytes()
    for path, size in ((wide, (256, 64)), (tall, (64, 213))):
        exact = Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        difference = np.asarray(samples[path.name]()).astype(int) - np.asarray(exact)
        assert np.abs(difference).mean() < 2
    upright = Image.open(turned).rotate(-90, expand=True).resize((64, 213))
    assert np.abs(np.asarray(samples["turned.jpg"]()).astype(int) - np.asarray(upright)).mean() < 2


def test_pixels_without_an_encoding_are_kept_as_png(tmp_path: Path) -> None:
    """Also a packed file of 0.1.0: that converts it."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=["a", "b"] * 3)
    moce.pack(tmp_path / "a.npz", size=(20, 24), out=tmp_path / "a.moce")
    for source in ("a.npz", "a.moce"):
        moce.pack(tmp_path / source, out=tmp_path / source[2:])
        packed = load_images(str(tmp_path / source[2:]), (20, 24))
        assert torch.equal(packed.take(slice(None)), torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert packed.labels == ["a", "b"] * 3
    first = next(iter(open_source(str(tmp_path / "npz")))).open
    assert first.read()[1:4] == b"PNG"


def test_images_of_other_channels_are_listed_and_named(tmp_path: Path) -> None:
    pixels = np.zeros((3, 20, 24, 13), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    with pytest.raises(MoceError, match=r"no readable image.*13 channels"):
        moce.pack(tmp_path / "a.npz", out=tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_commands_take_the_folder_and_the_clusters_of_its_source_fit(runs: Runs, tmp_path) -> None:
    packed = moce.pack(runs.data, out=tmp_path / "data").file
    task = moce.pack(runs.task, out=tmp_path / "task").file
    customize(runs.moce, task, out=tmp_path / "backbone")
    one, other = (
        json.loads((folder / "selection.json").read_text())["cluster_histogram"]
        for folder in (runs.backbone, tmp_path / "backbone")
    )
    assert one == other
    settings = {"num_experts": 2, "steps": 1, "batch_size": 16, **RUNTIME}
    moce.train(packed, mae=runs.mae, clusters=runs.clusters, out=tmp_path / "moce", **settings)


# --- interruption ---------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path, small_shards) -> Path:
    """A pack that was killed in its third file."""
    out, appended = tmp_path / "killed", []
    append = ShardWriter.append

    def kill(self, rows) -> None:
        appended.append(len(rows))
        if len(list(out.glob("images-*.parquet"))) == 2:
            raise KeyboardInterrupt
        append(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "append", kill)
        with pytest.raises(KeyboardInterrupt):
            moce.pack(folder, out=out, **PACK)
    assert sorted(contents(out)) == [JOURNAL, "images-00000.parquet", "images-00001.parquet"]
    return out


@pytest.mark.parametrize("damage", ["", "half a line", "changed", "missing", "temporary"])
def test_resumed_is_uninterrupted_to_the_byte(folder, interrupted, tmp_path, damage, capsys):
    whole = moce.pack(folder, out=tmp_path / "whole", workers=3, **PACK).file
    first, second = (interrupted / f"images-0000{n}.parquet" for n in (0, 1))
    if damage == "half a line":
        with (interrupted / JOURNAL).open("a") as file:
            file.write('{"file": "images-00002.par')
    elif damage == "changed":
        second.write_bytes(second.read_bytes()[:-9] + b"x" + second.read_bytes()[-8:])
    elif damage == "missing":
        first.unlink()
    elif damage == "temporary":
        (interrupted / ".images-00002.parquet.abc_1234").write_bytes(b"half a file")
    kept = first.stat().st_mtime_ns if first.exists() else 0
    capsys.readouterr()
    moce.pack(folder, out=interrupted, **PACK)
    assert contents(interrupted) == contents(whole)
    assert ("resuming after" in capsys.readouterr().err) == (damage != "missing")
    assert (first.stat().st_mtime_ns == kept) == (damage != "missing")


def test_ctrl_c_keeps_complete_files(folder, tmp_path, small_shards, capsys) -> None:
    append = ShardWriter.append

    def stop(self, rows) -> None:
        if (tmp_path / "a" / "images-00001.parquet").exists():
            signal.raise_signal(signal.SIGINT)
        append(self, rows)

    command = ["pack", str(folder), "--out", str(tmp_path / "a"), "--shard-size", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "append", stop)
        assert main(command) == 128 + signal.SIGINT
    assert "run the same command to resume" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]
    with pytest.raises(MoceError, match="not packed completely; run its moce pack again"):
        open_source(str(tmp_path / "a"))
    assert main(command) == 0
    assert "resuming after" in capsys.readouterr().err
    assert same(load_images(str(tmp_path / "a"), SIZE), load_images(str(folder), SIZE))


def test_a_pack_of_other_images_or_settings_is_not_resumed(folder, interrupted, tmp_path) -> None:
    for data, settings in [
        (folder, {"shorter_side": 20}),
        (folder, {"shard_size": 2}),
        (write_images(tmp_path / "other", per_source=2), {}),
    ]:
        with pytest.raises(MoceError, match="other images or settings; add --overwrite"):
            moce.pack(data, out=interrupted, **{**PACK, **settings})
    assert moce.pack(folder, out=interrupted, overwrite=True, shard_size=2).images == 40
    shards = [shard.file for shard in read_manifest(interrupted).shards]
    assert sorted(contents(interrupted)) == [MANIFEST, *shards]


# --- mistakes and damage --------------------------------------------------------------------------


def test_what_has_changed_under_the_manifest_is_refused(folder, tmp_path, small_shards) -> None:
    packed = moce.pack(folder, out=tmp_path / "a", verify=True, **PACK).file
    assert main(["pack", str(packed), "--verify"]) == 0
    shard = packed / "images-00001.parquet"
    content = shard.read_bytes()
    cases = [
        (None, r"images-00001\.parquet is missing", r"is missing"),
        (content[:-20], r"has changed since it was packed: images-00001", "has changed"),
        (content[:99] + b"?" + content[100:], None, r"images-00001.parquet does not match"),
    ]
    for damaged, refused, found in cases:
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        if refused is None:
            assert len(open_source(str(packed))) == 40
        else:
            with pytest.raises(MoceError, match=refused):
                open_source(str(packed))
        with pytest.raises(MoceError, match=found):
            moce.pack(packed, verify=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:40],
        lambda text: text.replace("moce images", "mice"),
        lambda text: text.replace('"file": "images-00000', '"file": "../images-00000'),
        lambda text: text.replace('"sha256"', '"sha1"'),
        lambda text: "[]",
    ],
)
def test_a_corrupt_manifest_is_refused(edit, tmp_path: Path) -> None:
    packed = moce.pack(write_images(tmp_path / "d", per_source=2), out=tmp_path / "a").file
    (packed / MANIFEST).write_text(edit((packed / MANIFEST).read_text()))
    with pytest.raises(MoceError, match="is corrupt or was edited") as refusal:
        open_source(str(packed / MANIFEST))
    assert "\n" not in str(refusal.value)


def test_mistakes_are_refused_in_one_line_and_write_nothing(folder, tmp_path) -> None:
    full = tmp_path / "full"
    (full / "notes").mkdir(parents=True)
    (tmp_path / "alone").mkdir()
    shutil.copy(next(folder.rglob("*.png")), tmp_path / "alone" / "images-00000.parquet")
    (tmp_path / "file").write_text("x")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for settings, reason in [
        ({"out": full}, "contains notes, which moce pack did not write"),
        ({"out": tmp_path / "alone", "overwrite": True}, "did not write"),
        ({"out": tmp_path / "file"}, "is a file"),
        ({"out": folder / "packed"}, "lie in each other"),
        ({"out": folder.parent}, "lie in each other"),
        ({"out": tmp_path / "a.moce"}, "add --size"),
        ({"out": tmp_path / "a", "quality": 80}, "only --shorter-side uses it"),
        ({"out": tmp_path / "a", "channels": 1}, "only --size uses it"),
        ({"out": tmp_path / "a", "size": 9, "shorter_side": 9}, "leave out one of them"),
        ({"out": tmp_path / "file" / "a"}, "cannot make"),
        ({}, "add --out"),
        ({"verify": True}, "not a packed folder or file"),
    ]:
        with pytest.raises(MoceError, match=reason) as refusal:
            moce.pack(folder, **settings)
        assert "\n" not in str(refusal.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_packed_folder_is_replaced_only_on_request(folder, tmp_path, small_shards) -> None:
    packed = moce.pack(folder, out=tmp_path / "a", **PACK).file
    with pytest.raises(MoceError, match="is packed already; add --overwrite"):
        moce.pack(folder, out=packed)
    moce.pack(folder, out=packed, overwrite=True)
    assert sorted(contents(packed)) == [MANIFEST, "images-00000.parquet"]


def test_a_full_disk_is_one_line_and_leaves_what_is_complete(folder, tmp_path, small_shards):
    """A limit on the size of files fails as a full disk does, in the middle of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(
            MoceError, match=r"cannot write .*images-00000\.parquet: File too large"
        ):
            moce.pack(folder, out=tmp_path / "a", **PACK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
    assert sorted(contents(tmp_path / "a")) == [JOURNAL]
    assert moce.pack(folder, out=tmp_path / "a", **PACK).images == 40
