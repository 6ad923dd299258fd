"""Damaged, edited, foreign and harmful files are refused in one line; nothing is written."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from commands import World, one_line, run_command
from test_refusals import Case, refuse

INFO, WEIGHTS, CONFIG, CLUSTERS = (
    "model.json",
    "model.safetensors",
    "config.yaml",
    "assignments.parquet",
)


def parquet(**columns: list) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def header_of(length: int, text: bytes = b"{}") -> bytes:
    """The start of a safetensors file with a header of the claimed length."""
    return struct.pack("<Q", length) + text


def truncated(w: World, run: str) -> Path:
    whole = (getattr(w.runs, run) / WEIGHTS).read_bytes()
    return w.edited(run, WEIGHTS, whole[: len(whole) // 2])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def swapped(w: World, run: str, other: str) -> Path:
    """A run with the weights of another."""
    return w.edited(run, WEIGHTS, (getattr(w.runs, other) / WEIGHTS).read_bytes())


def pipe_in_run(w: World) -> Path:
    """A run with a named pipe, which nobody writes to, in the place of its weights."""
    run = w.edited("mae", WEIGHTS, b"x")
    (run / WEIGHTS).unlink()
    os.mkfifo(run / WEIGHTS)
    return run


def pickled(w: World) -> Path:
    content = {"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, w.folder / "checkpoint.pth")
    return w.folder / "checkpoint.pth"


def npz(w: World, **arrays: np.ndarray) -> Path:
    np.savez(w.folder / "data.npz", **arrays)
    return w.folder / "data.npz"


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(dtype)


DAMAGED: dict[str, Case] = {
    # model.json
    "no JSON": (lambda w: w.cluster(mae=w.edited("mae", INFO, "{")), INFO),
    "a list": (lambda w: w.cluster(mae=w.edited("mae", INFO, "[1]")), INFO),
    "bytes": (lambda w: w.cluster(mae=w.edited("mae", INFO, b"\xff\xfe")), INFO),
    "a kind that is no word": (lambda w: w.cluster(mae=w.edited("mae", INFO, kind=[3])), "[3]"),
    "no spec": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec=None)), INFO),
    "a spec that is a word": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec="vit")), INFO),
    "no encoder": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec__encoder=None)), INFO),
    "unknown part of a spec": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec__more=3)), INFO),
    "a width that is a word": (
        lambda w: w.cluster(mae=w.edited("mae", INFO, spec__decoder_dim="wide")), INFO),
    "a width of none": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec__decoder_dim=0)), INFO),
    "no heads": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec__decoder_heads=0)), INFO),
    "another depth": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec__decoder_depth=2)), "do not fit"),
    "another model": (
        lambda w: w.cluster(mae=w.edited("mae", INFO, spec__encoder__name="resnet18")), "resnet18"),
    "a mean that is a word": (
        lambda w: w.cluster(mae=w.edited("mae", INFO, spec__encoder__mean="x")), INFO),
    "too few means": (lambda w: w.cluster(mae=w.edited("mae", INFO, spec__encoder__mean=[0.5])), INFO),
    "a deviation of none": (
        lambda w: w.cluster(mae=w.edited("mae", INFO, spec__encoder__std=[0, 0, 0])), INFO),
    "a mask of everything": (
        lambda w: w.train(mae=w.edited("mae", INFO, spec__mask_ratio=1.5)), INFO),
    "clusters without theirs": (
        lambda w: w.train(clusters=w.edited("clusters", INFO, clusters=None)), INFO),
    "clusters of another encoder": (
        lambda w: w.train(clusters=w.edited("clusters", INFO, clusters__encoder="x")), INFO),
    "clusters of a pooling that is none": (
        lambda w: w.train(clusters=w.edited("clusters", INFO, clusters__pooling="max")), INFO),
    "clusters without their similarity": (
        lambda w: w.train(clusters=w.edited("clusters", INFO, clusters__epsilon="x")), INFO),
    "a mixture without a spec": (
        lambda w: w.customize(run=w.edited("moce", INFO, spec=None)), INFO),
    "a mixture of other blocks": (
        lambda w: w.customize(run=w.edited("moce", INFO, spec__blocks=[1, 9])), INFO),
    "a mixture of more experts": (
        lambda w: w.customize(run=w.edited("moce", INFO, spec__num_experts=4)), "do not fit"),
    "a mixture of blocks that are words": (
        lambda w: w.customize(run=w.edited("moce", INFO, spec__blocks="one")), INFO),
    "a backbone's config": (
        lambda w: w.probe(backbone=w.edited("backbone", "config.json", "{")), "config.json"),
    "a backbone's arguments": (
        lambda w: w.probe(backbone=w.edited("backbone", "config.json", model_args=[1])), "config.json"),
    "a backbone's name": (
        lambda w: w.probe(backbone=w.edited("backbone", "config.json", architecture=3)), "no model '3'"),
    # weights
    "truncated weights": (lambda w: w.cluster(mae=truncated(w, "mae")), WEIGHTS),
    "weights that are none": (lambda w: w.cluster(mae=w.edited("mae", WEIGHTS, "junk")), WEIGHTS),
    "empty weights": (lambda w: w.cluster(mae=w.edited("mae", WEIGHTS, "")), WEIGHTS),
    "a header longer than the file": (
        lambda w: w.cluster(mae=w.edited("mae", WEIGHTS, header_of(2**40))), WEIGHTS),
    "a header that is no JSON": (
        lambda w: w.cluster(mae=w.edited("mae", WEIGHTS, header_of(2, b"[["))), WEIGHTS),
    "weights of another run": (lambda w: w.cluster(mae=swapped(w, "mae", "clusters")), "do not fit"),
    "clusters with weights of an MAE": (
        lambda w: w.train(clusters=swapped(w, "clusters", "mae")), "edited_clusters"),
    "a mixture with weights of an MAE": (
        lambda w: w.customize(run=swapped(w, "moce", "mae")), "do not fit"),
    "a backbone with weights of a mixture": (
        lambda w: w.probe(backbone=swapped(w, "backbone", "moce")), "several networks"),
    "a pointer of git-lfs": (
        lambda w: w.cluster(mae=w.file("a.pth", LFS)), "git lfs pull"),
    "a pointer of git-lfs in a run": (
        lambda w: w.probe(backbone=w.edited("mae", WEIGHTS, LFS)), "git lfs pull"),
    "a pointer of git-lfs to convert": (
        lambda w: w.convert("--trust-pickle", weights=w.file("b.pth", LFS)), "git lfs pull"),
    "a web page": (
        lambda w: w.pretrain(None, "--init", w.file("a.bin", "<!DOCTYPE html>\n<html>")), "web page"),
    "a web page as safetensors": (
        lambda w: w.export(run=w.file("b.safetensors", " <html><body>")), "web page"),
    "a text": (lambda w: w.embed(backbone=w.file("a.pt", "Not found ä")), "it is text"),
    "an empty file of weights": (lambda w: w.embed(backbone=w.file("a.pt", "")), "is empty"),
    "a pipe of weights": (lambda w: w.cluster(mae=pipe(w, "a.pth")), "no weights at"),
    "a pipe as backbone": (lambda w: w.embed(backbone=pipe(w, "a.safetensors")), "no weights at"),
    "a pipe in a run": (
        lambda w: w.embed(backbone=pipe_in_run(w)), "it is no file"),
    "a pipe to convert": (lambda w: w.convert(weights=pipe(w, "c.pth")), "no weights at"),
    "a pipe to export": (lambda w: w.export(run=pipe(w, "d.pth")), "no weights at"),
    "a mixture's truncated weights": (lambda w: w.customize(run=truncated(w, "moce")), WEIGHTS),
    "a file of junk": (lambda w: w.cluster(mae=w.file("a.pth", "junk")), "cannot read weights"),
    "a file of pickle": (lambda w: w.cluster(mae=pickled(w)), "--trust-pickle"),
    "a file of pickle to export": (lambda w: w.export(run=pickled(w)), "moce convert"),
    "a file of pickle to convert": (lambda w: w.convert(weights=pickled(w)), "--trust-pickle"),
    "a file of other tensors": (
        lambda w: w.cluster(mae=_tensors(w, a=torch.zeros(2))), "no weights that moce can read"),
    "a config of heads that are words": (
        lambda w: w.cluster(mae=_transformers(w, num_attention_heads="x")), "timm cannot build"),
    "a config of sizes that are words": (
        lambda w: w.cluster(mae=_transformers(w, image_size="x")), "corrupt"),
    "a config of another library": (
        lambda w: w.cluster(mae=_transformers(w, model_type="swin")), "'swin'"),
    "a config that is no JSON": (
        lambda w: w.cluster(mae=_transformers(w, content="{")), "config.json"),
    # config.yaml and assignments.parquet
    "settings that are gone": (
        lambda w: w.train(clusters=w.edited("clusters", CONFIG, "")), CONFIG),
    "settings of clusters without data": (
        lambda w: w.train(clusters=w.edited("clusters", CONFIG, "seed: 0")), CONFIG),
    "settings that are no YAML": (
        lambda w: w.train(clusters=w.edited("clusters", CONFIG, "[1")), CONFIG),
    "assignments that are none": (
        lambda w: w.train(clusters=w.edited("clusters", CLUSTERS, "junk")), CLUSTERS),
    "assignments cut short": (
        lambda w: w.train(clusters=w.edited("clusters", CLUSTERS, parquet(id=["a"])[:-9])), CLUSTERS),
    "assignments without clusters": (
        lambda w: w.train(clusters=w.edited("clusters", CLUSTERS, parquet(id=["a"]))), CLUSTERS),
    "assignments of words": (
        lambda w: w.train(clusters=_assigned(w, ["x"])), CLUSTERS),
    "assignments to no cluster": (lambda w: w.train(clusters=_assigned(w, [99])), CLUSTERS),
    "assignments to negative clusters": (lambda w: w.train(clusters=_assigned(w, [-5])), CLUSTERS),
    "assignments of nothing": (lambda w: w.train(clusters=_assigned(w, [None])), CLUSTERS),
    "report of an edited run": (lambda w: w.report(w.edited("clusters", INFO, clusters=None)), INFO),
    "report of an edited mixture": (lambda w: w.report(w.edited("moce", INFO, routes=None)), INFO),
    "report of a mixture without its routes": (
        lambda w: w.report(w.edited("moce", INFO, experts_of_clusters=[1])), INFO),
    "report of results that are words": (
        lambda w: w.report(_rows(w, 1)), "rows.jsonl"),
    "report of values that are words": (
        lambda w: w.report(_rows(w, {
            "task": "t", "backbone": "b", "reference": "b", "selection": None, "protocol": "linear",
            "metric": "accuracy", "labels": 9, "values": ["x"]})),
        "rows.jsonl"),
    "report of metrics that are words": (
        lambda w: w.report(w.edited("mae", INFO, metrics="good")), INFO),
    "report of edited settings": (lambda w: w.report(w.edited("mae", CONFIG, "[1]")), CONFIG),
}  # fmt: skip


def _transformers(w: World, content: str | None = None, **changes: object) -> Path:
    """A folder of Transformers with an edited config.json."""
    folder = w.folder / "theirs"
    run_command(["export", w.runs.mae, "--format", "transformers", "--out", folder])
    config = folder / "config.json"
    config.write_text(content or json.dumps({**json.loads(config.read_text()), **changes}))
    return folder


def _rows(w: World, row: object) -> Path:
    """A run with an edited row of results."""
    return w.edited("mae", "rows.jsonl", json.dumps(row))


def _tensors(w: World, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, w.folder / "a.pth")
    return w.folder / "a.pth"


def _assigned(w: World, clusters: list) -> Path:
    """The run of clusters with every image in the given one."""
    ids = pyarrow.parquet.read_table(w.runs.clusters / CLUSTERS)["id"].to_pylist()
    return w.edited("clusters", CLUSTERS, parquet(id=ids, cluster=clusters * len(ids)))


def png(width: int, height: int) -> bytes:
    """A small file that claims the given size in pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def tar(w: World, **members: bytes) -> Path:
    with tarfile.open(w.folder / "data.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return w.folder / "data.tar"


def loop(w: World) -> Path:
    (w.folder / "a").mkdir()
    (w.folder / "a" / "b").symlink_to("..", target_is_directory=True)
    (w.folder / "c.png").symlink_to("c.png")
    return w.folder


def empty(w: World) -> Path:
    (w.folder / "images").mkdir()
    return w.folder / "images"


IMAGES: dict[str, Case] = {
    "an empty folder": (lambda w: w.pretrain(empty(w)), "no images in"),
    "a folder of other files": (lambda w: w.pretrain(w.file("d/a.txt", "x").parent), "no images in"),
    "a folder of junk": (lambda w: w.pretrain(w.file("d/a.png", "x").parent), "no readable image"),
    "an image of a hundred million pixels": (
        lambda w: w.pretrain(w.file("d/a.png", png(10000, 10000)).parent), "pixels are more than"),
    "a link to itself": (lambda w: w.pretrain(loop(w)), "no readable image"),
    "a file that is none": (lambda w: w.pretrain(w.file("a.txt", "x")), "not a format that moce reads"),
    "a folder called as a file": (
        lambda w: w.pretrain(w.file("a.parquet/b.txt", "x").parent), "no images in"),
    "a folder called as shards": (
        lambda w: w.pretrain(w.file("a.tar/b.txt", "x").parent), "a.tar"),
    "a name that is too long": (lambda w: w.pretrain("x" * 5000), "no such images"),
    "a name with a zero": (lambda w: w.pretrain("a\0b"), "a"),
    "an image of a billion pixels": (
        lambda w: w.pretrain(w.file("d/a.png", png(40000, 40000)).parent), "exceeds limit"),
    "a parquet file that is none": (lambda w: w.pretrain(w.file("a.parquet", "x")), "a.parquet"),
    "a parquet file without images": (
        lambda w: w.pretrain(w.file("a.parquet", parquet(x=[1]))), "no column 'image'"),
    "a parquet file of structs for labels": (
        lambda w: w.pretrain(w.file("a.parquet", parquet(image=[b"x"], label=[{"a": 1}]))),
        "column 'label'"),
    "a parquet file of names that are no text": (
        lambda w: w.pretrain(w.file("a.parquet", parquet(image=[b"x"], id=[b"\xff"]))), "column 'id'"),
    "an array that is none": (lambda w: w.pretrain(w.file("a.npy", "x")), "a.npy"),
    "arrays of unclear names": (
        lambda w: w.pretrain(npz(w, one=noise(4, 8, 8), two=noise(4, 8, 8))), "arrays: one, two"),
    "arrays of words": (lambda w: w.pretrain(npz(w, images=np.array(["a", "b"]))), "[n, h, w]"),
    "pickled arrays": (
        lambda w: w.pretrain(w.file("a.npy", _pickled_array())), "a.npy"),
    "too many labels": (
        lambda w: w.pretrain(npz(w, images=noise(4, 8, 8), labels=np.arange(5))), "5 values for 4"),
    "floats that are no numbers": (
        lambda w: w.pretrain(npz(w, images=np.full((4, 8, 8), np.nan))), "float pixels from nan"),
    "infinite floats": (lambda w: w.pretrain(npz(w, images=np.full((4, 8, 8), np.inf))), "inf"),
    "four channels for three": (
        lambda w: w.pretrain(npz(w, images=noise(4, 8, 8, 4))), "4 channels for an encoder of 3"),
    "an archive that is none": (lambda w: w.pretrain(w.file("a.tar", "x")), "a.tar"),
    "an archive that leads out": (
        lambda w: w.pretrain(tar(w, **{"../a.png": b"x", "/tmp/b.png": b"x"})), "leads out"),
    "an archive that is a pipe": (lambda w: w.pretrain(pipe(w, "a.tar")), "a.tar is not a file"),
    "an archive that claims a terabyte": (
        lambda w: w.pretrain(w.file("a.tar", _huge_member())), "ends within the image"),
    "shards of unending numbers": (
        lambda w: w.pretrain(f"a-{{0..{'9' * 5000}}}.tar"), "no such images"),
    "a file in the place of an array": (lambda w: w.pretrain(_zip(w)), "images is not an array"),
    "no such shard": (lambda w: w.pretrain(w.folder / "a-{0..3}.tar"), "a-0.tar"),
    "a billion shards": (lambda w: w.pretrain("a-{0..999999999}.tar"), "stands for more than"),
    "a list of nothing": (lambda w: w.pretrain(f"@{w.file('l.txt', '')}"), "names no images"),
    "a list that is gone": (lambda w: w.pretrain("@/no/list.txt"), "cannot read the list"),
    "a list of images that are gone": (
        lambda w: w.pretrain(f"@{w.file('l.txt', 'gone.png')}"), "gone.png"),
    "an empty name": (lambda w: w.pretrain("a,,b"), "empty name"),
    "a packed file that is none": (lambda w: w.pretrain(w.file("a.moce", "x")), "a.moce"),
    "no such data set": (lambda w: w.pretrain("torchvision:cifar11"), "torchvision:cifar10"),
    # tasks
    "a task of one image": (lambda w: w.probe(data=w.images("cat/a.png")), "one image"),
    "a task of one class": (
        lambda w: w.probe(data=w.images("train/cat/a.png", "train/cat/b.png", "test/cat/c.png")),
        "only one class"),
    "a task without test images": (
        lambda w: w.probe(data=w.images("train/cat/a.png", "train/dog/b.png")), "class 'cat' has one image"),
    "a class without training images": (
        lambda w: w.probe(data=w.images("train/cat/a.png", "train/dog/b.png", "test/cow/c.png")),
        "without training images: cow"),
    "unlabeled images to customize for by labels": (
        lambda w: w.customize("--strategy", "probe", images=w.images("a.png", "b.png")), "no labels"),
    "an empty task to customize for": (lambda w: w.customize(images=empty(w)), "no images in"),
    "a task to customize for that is gone": (
        lambda w: w.customize(images="/no/images"), "no such images"),
    "images to pack that are gone": (lambda w: w.pack(data="/no/images"), "no such images"),
    "images to pack that are none": (
        lambda w: w.pack(data=w.file("d/a.png", "x").parent), "no readable image"),
}  # fmt: skip


def pipe(w: World, name: str) -> Path:
    os.mkfifo(w.folder / name)
    return w.folder / name


def _huge_member() -> bytes:
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    return info.tobuf() + bytes(1024)


def _zip(w: World) -> Path:
    with zipfile.ZipFile(w.folder / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"junk")
    return w.folder / "a.npz"


def _pickled_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


TABLE = {f"run: {k}": v for k, v in DAMAGED.items()} | {f"data: {k}": v for k, v in IMAGES.items()}


@pytest.mark.parametrize("name", TABLE)
def test_an_unusable_file_is_refused_in_one_line(name: str, runs, tmp_path: Path, capsys) -> None:
    line = refuse(TABLE[name], runs, tmp_path, capsys)
    assert not Path("/tmp/b.png").exists() and not (tmp_path.parent / "a.png").exists()
    if name == "run: a file of pickle":
        assert "argparse.Namespace" in line


class Harmful:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.npy", "pytorch_model.bin"])
def test_code_in_pickles_is_not_run(name: str, runs, tmp_path: Path, capsys) -> None:
    world, mark = World(runs, tmp_path), tmp_path / "mark"
    content = pickle.dumps({"model": Harmful(mark)})
    path = world.file(name, content)
    words = world.pretrain(path) if name == "a.npy" else world.cluster(mae=path)
    assert run_command(words) == 2
    one_line(capsys.readouterr().err)
    assert not mark.exists()
