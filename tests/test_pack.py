"""Packed files: the same images as decoding gives, resumable, checked, for every command."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import PRETRAIN, RUNTIME, customize, write_images, write_task
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

import moce
from moce.cli import main
from moce.data.augment import fitted
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.loader import BatchOrder, fetch, in_order, prefetched
from moce.data.pack import Packer
from moce.data.readers.factory import open_source
from moce.data.readers.packed import HEADER_BYTES, open_packed
from moce.errors import Interrupted, MoceError
from moce.evaluation.task import load_task
from moce.runs.assignments import read_assignments
from moce.runs.model import read_timings

SIZE = (16, 16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 images and two broken ones."""
    root = write_images(tmp_path_factory.mktemp("images") / "data", per_source=10)
    (root / "a_broken.png").write_bytes(b"junk")
    (root / "mnist" / "z_short.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """The folder, packed at 20x24."""
    return moce.pack(folder, size=(20, 24), out=folder.parent / "store.moce").file


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moce.data.pack.MOST_IN_CHUNK", 4)


def same(one: ImageDataset, other: ImageDataset) -> bool:
    described = [(images.ids, images.labels, images.splits) for images in (one, other)]
    pixels = [images.take(slice(None)) for images in (one, other)]
    return torch.equal(*pixels) and described[0] == described[1]


# --- what is in the file ---------------------------------------------------------------------------


@pytest.mark.parametrize("memory_share", [0.4, 0.0])
def test_a_packed_file_gives_what_decoding_gives(folder, store, memory_share, monkeypatch) -> None:
    usual = load_images(str(folder), (20, 24))
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", memory_share)
    packed = load_images(str(store), (20, 24))
    assert same(packed, usual)
    assert packed.skipped == usual.skipped and len(packed.skipped) == 2


def test_splits_and_labels_of_any_kind_are_kept(tmp_path: Path, monkeypatch) -> None:
    task = write_task(tmp_path / "task")
    moce.pack(task, size=16, out=tmp_path / "task.moce")
    usual, packed = (load_task(str(tmp_path / name), (3, *SIZE)) for name in ("task", "task.moce"))
    assert packed.classes == usual.classes
    assert (packed.train.ids, packed.test.ids) == (usual.train.ids, usual.test.ids)
    assert torch.equal(
        packed.train.take(slice(None)), load_images(str(task / "train"), SIZE).pixels
    )
    samples = list(open_source(str(task)))
    for row, label in enumerate([("cat", "dog"), (), None]):
        samples[row] = replace(samples[row], label=label)
    monkeypatch.setattr("moce.commands.pack.open_source", lambda data: samples)
    moce.pack(task, size=16, out=tmp_path / "many.moce")
    assert load_images(str(tmp_path / "many.moce"), SIZE).labels[:3] == [("cat", "dog"), (), None]


def test_a_file_is_known_by_its_content_and_can_be_packed_again(store, tmp_path) -> None:
    shutil.copy(store, tmp_path / "nameless")
    moce.pack(tmp_path / "nameless", size=16, out=tmp_path / "smaller.moce")
    smaller, larger = load_images(str(tmp_path / "smaller.moce"), SIZE), open_packed(store)
    assert smaller.pixels.shape == (40, 3, 16, 16) and smaller.ids == larger.ids


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(folder, store, workers, tmp_path, small_chunks):
    again = moce.pack(folder, size=(20, 24), out=tmp_path / "again", workers=workers)
    assert torch.equal(
        open_packed(again.file).tensor(in_memory=True), open_packed(store).tensor(in_memory=True)
    )


# --- interruption ------------------------------------------------------------------------------------


def packer(folder: Path, out: Path) -> Packer:
    return Packer(out, open_source(str(folder)), (3, *SIZE))


@pytest.mark.parametrize("chunks", [1, 3, 10])
@pytest.mark.parametrize("damage", ["", "half a line", "unjournaled pixels"])
def test_resumed_is_uninterrupted_to_the_byte(folder, tmp_path, small_chunks, chunks, damage):
    """As after a kill: nothing but what was written so far is left."""
    whole = moce.pack(folder, size=16, out=tmp_path / "whole").file
    killed = packer(folder, tmp_path / "killed")
    work = killed.chunks()
    for _ in range(chunks):
        next(work)
    work.close()
    if damage == "half a line":
        with (tmp_path / "killed.journal").open("a") as file:
            file.write('{"entries": 4, "ima')
    elif damage:
        with (tmp_path / "killed.partial").open("ab") as file:
            file.write(b"half an image")
    assert not (tmp_path / "killed").exists()
    decoded = []
    again = packer(folder, tmp_path / "killed")
    assert again.resume() == 4 * chunks
    decoded = [row["entries"] for row in again.chunks()]
    again.finish()
    assert sum(decoded) == 42 - 4 * chunks
    assert (tmp_path / "killed").read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


def test_ctrl_c_leaves_a_state_that_the_same_command_resumes(
    folder, tmp_path, small_chunks, capsys
) -> None:
    chunks = Packer.chunks

    def interrupted(self, workers):
        for number, chunk in enumerate(chunks(self, workers)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    command = ["pack", str(folder), "--size", "16", "--out", str(tmp_path / "a.moce")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packer, "chunks", interrupted)
        assert main(command) == 128 + signal.SIGINT
    assert "12 of 42 images" in capsys.readouterr().err
    assert main(command) == 0
    assert "resuming after 12 of 42" in capsys.readouterr().err
    assert same(load_images(str(tmp_path / "a.moce"), SIZE), load_images(str(folder), SIZE))


def test_a_pack_of_other_images_or_size_is_not_resumed(folder, tmp_path, small_chunks) -> None:
    work = packer(folder, tmp_path / "a").chunks()
    next(work)
    work.close()
    with pytest.raises(MoceError, match="other images or another size"):
        moce.pack(folder, size=17, out=tmp_path / "a")
    assert moce.pack(folder, size=17, out=tmp_path / "a", overwrite=True).images == 40


# --- mistakes and damage -----------------------------------------------------------------------------


def corrupted(store: Path, to: Path, place: int) -> Path:
    content = bytearray(store.read_bytes())
    content[place] ^= 1
    to.write_bytes(content)
    return to


@pytest.mark.parametrize("place", [3, 12, 40, -1, -500])
def test_a_corrupt_header_or_index_is_refused_when_opened(store, tmp_path, place) -> None:
    bad = corrupted(store, tmp_path / "bad.moce", place)
    with pytest.raises(MoceError, match=r"bad.moce is corrupt") as refusal:
        load_images(str(bad), SIZE)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [0, 5, 100, HEADER_BYTES, HEADER_BYTES + 1000, -1])
def test_a_file_cut_short_is_refused_when_opened(store, tmp_path, length) -> None:
    (tmp_path / "short.moce").write_bytes(store.read_bytes()[:length])
    with pytest.raises(MoceError, match=r"short.moce is corrupt"):
        open_source(str(tmp_path / "short.moce"))


def test_corrupt_pixels_are_found_by_verify(store, tmp_path, capsys) -> None:
    assert main(["pack", str(store), "--verify"]) == 0
    bad = corrupted(store, tmp_path / "bad.moce", HEADER_BYTES + 7 * 3 * 20 * 24)
    assert len(load_images(str(bad), SIZE)) == 40  # not checked when opened
    assert main(["pack", str(bad), "--verify"]) == 2
    assert "images 0 to 39 have changed" in capsys.readouterr().err


def test_mistakes_are_refused_in_one_line(folder, store, tmp_path) -> None:
    for settings, reason in [
        ({"size": 16}, "--out"),
        ({"out": tmp_path / "a.moce"}, "--size"),
        ({"size": 16, "out": store}, "--overwrite"),
        ({"size": 16, "out": tmp_path}, "is a folder"),
        ({"verify": True}, "not a packed folder or file"),
        ({"size": "16x", "out": tmp_path / "a"}, "size"),
        ({"size": 0, "out": tmp_path / "a"}, "size"),
        ({"size": "99999", "out": tmp_path / "a"}, "free"),
    ]:
        with pytest.raises(MoceError, match=reason):
            moce.pack(folder, **settings)
    for data in (store, [store, folder]):
        with pytest.raises(MoceError, match="is the input"):
            moce.pack(data, size=16, out=store, overwrite=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    with pytest.raises(MoceError, match="no readable image"):
        moce.pack(tmp_path / "broken", size=16, out=tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_images_smaller_than_the_model_are_refused(store: Path) -> None:
    with pytest.raises(MoceError, match=r"20x24, smaller than the 24x24.*--size 24x24"):
        load_images(str(store), (24, 24))


# --- larger images than the model's, and batches ------------------------------------------------------


@pytest.mark.parametrize("size", [(10, 12), (10, 10), (5, 10), (10, 6)])
def test_images_are_center_cropped_as_pillow_does(store: Path, size: tuple[int, int]) -> None:
    """Except at the margin, where Pillow also uses pixels outside the crop."""
    pixels = load_images(str(store), SIZE).pixels[:12]
    margin = 0 if size == (10, 12) else 2
    for image, ours in zip(pixels, fitted(pixels, size), strict=True):
        theirs = ImageOps.fit(to_pil_image(image), size[::-1], Image.Resampling.BICUBIC)
        difference = (ours.int() - pil_to_tensor(theirs).int()).abs()
        inner = difference[:, margin : size[0] - margin, margin : size[1] - margin]
        assert inner.max() <= 8  # Pillow rounds and clips between the two directions
        assert inner.float().mean() < 1


def test_reading_in_order_fits_the_images_and_training_crops_them(store: Path) -> None:
    images = load_images(str(store), SIZE)
    assert images.pixels.shape[2:] == (20, 24)
    read = torch.cat(list(in_order(images, 7, CPU, SIZE)))
    assert torch.equal(read, fitted(images.pixels, SIZE)) and read.shape == (40, 3, 16, 16)


@pytest.mark.parametrize("memory_share", [0.4, 0.0])
def test_prefetched_batches_equal_those_fetched_one_by_one(
    store, memory_share, monkeypatch
) -> None:
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", memory_share)
    images = load_images(str(store), SIZE)
    order = BatchOrder(len(images), 12, seed=3)
    micro_batches = list(order.micro_batches(2, 9, 5))
    assert [len(rows) for rows, _ in micro_batches] == [5, 5, 2] * 7
    assert torch.equal(torch.cat([rows for rows, _ in micro_batches[:3]]), order(2)[0])
    batches = list(prefetched(images, micro_batches, CPU))
    for (rows, epochs), batch in zip(micro_batches, batches, strict=True):
        expected = fetch(images, rows, epochs, CPU)
        assert torch.equal(batch.pixels, expected.pixels)
        assert torch.equal(batch.rows, rows) and torch.equal(batch.epochs, epochs)


def test_an_error_while_prefetching_reaches_the_trainer_and_leaving_early_is_clean(store) -> None:
    images = load_images(str(store), SIZE)
    bad = [(torch.tensor([0]), torch.tensor([0])), (torch.tensor([10**6]), torch.tensor([0]))]
    batches = prefetched(images, bad, CPU)
    next(batches)
    with pytest.raises(IndexError):
        next(batches)
    endless = prefetched(images, BatchOrder(40, 4, 0).micro_batches(0, 10**9, None), CPU)
    next(endless)
    endless.close()


# --- every command -----------------------------------------------------------------------------------------


def test_the_commands_take_a_packed_file(folder, store, tmp_path, monkeypatch) -> None:
    """From a mapped file of larger images, and from memory; the folder's clusters fit its file."""
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    mae, clusters, mixture = (tmp_path / name for name in ("mae", "clusters", "moce"))
    moce.pretrain(store, out=mae, steps=3, **PRETRAIN)
    for row in read_timings(mae):
        assert 0 <= row["data_wait_s"] <= row["step_s"]
    assert (mae / "skipped.jsonl").read_text().count("\n") == 2
    moce.cluster(store, mae=mae, out=clusters, num_clusters=4, max_iterations=3, **RUNTIME)
    settings = {"num_experts": 2, "steps": 2, "batch_size": 16, **RUNTIME}
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.4)
    moce.train(store, mae=mae, clusters=clusters, out=mixture, **settings)
    assert load_images(str(folder), SIZE).ids == list(read_assignments(clusters).to_dict())
    task = moce.pack(write_task(tmp_path / "task"), size=18, out=tmp_path / "task.moce").file
    backbone = tmp_path / "backbone"
    customize(mixture, task, out=backbone)
    choice = json.loads((backbone / "selection.json").read_text())
    assert sum(choice["cluster_histogram"]) == 24  # the training images
    moce.probe(backbone, task, kind="knn", **RUNTIME)


def test_an_interruption_names_the_way_on() -> None:
    assert str(Interrupted(2, "runs/a", "step 4")).endswith("resume with --resume")
