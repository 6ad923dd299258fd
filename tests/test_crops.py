"""Training crops come from the whole original image, and are the same however they are made."""

from __future__ import annotations

import math
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import PRETRAIN, TINY_ARGS
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

import moce
from moce.data import workers as workers_module
from moce.data.augment import TRIES, random_crops
from moce.data.decode import open_encoded, resized_box, upright_size
from moce.data.load import load_images, open_images
from moce.data.loader import BatchOrder, Loading, view_batches
from moce.data.views import Views
from moce.errors import MoceError
from moce.runs.model import read_skipped

CPU, SIZE = torch.device("cpu"), (32, 32)
VIEWS = Views(seed=3, size=SIZE, smallest_crop=0.2, hflip=True)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Two photographs, [427, 640, 3]."""
    return load_sample_images().images


@pytest.fixture(scope="module")
def folder(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve cuts of photographs, of different sizes, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(12):
        photo = photos[number % 2][number * 5 : 180 + number * 9, number * 7 : 300]
        path = root / "ab"[number % 2] / f"{number}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(path)
    return root


def boxes_by_torchvision(numbers: torch.Tensor, height: int, width: int, monkeypatch) -> list[int]:
    """Its own code, fed with the numbers in the order in which it draws them."""
    left = iter(numbers.reshape(-1, 4).tolist())
    current: list[float] = []

    def uniform(low: float, high: float) -> torch.Tensor:
        if not current or len(current) == 2:
            current[:] = next(left)
        number = current.pop(0)
        return torch.tensor([low + (high - low) * number])

    class Drawn(torch.Tensor):
        pass

    def empty(count: int):
        class Values:
            def uniform_(self, low: float, high: float) -> torch.Tensor:
                return uniform(low, high)

        return Values()

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([int(current.pop(0) * high)])

    crop = v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "randint", randint)
        found = crop.make_params([torch.zeros(3, height, width)])
    return [found[name] for name in ("top", "left", "height", "width")]


@pytest.mark.parametrize("size", [(40, 60), (100, 20), (30, 150), (37, 37)])
def test_boxes_are_those_of_torchvision(size: tuple[int, int], monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(60, 4 * TRIES, generator=generator)
    expected = [boxes_by_torchvision(row, *size, monkeypatch) for row in numbers]
    assert random_crops(numbers, size, 0.2).tolist() == expected


@pytest.mark.parametrize("target", [(32, 32), (224, 224), (48, 96)])
def test_a_crop_is_torchvisions_on_the_same_box(photos, target) -> None:
    generator = torch.Generator().manual_seed(1)
    image = Image.fromarray(photos[0])
    tensor = functional.pil_to_tensor(image)
    for box in random_crops(torch.rand(8, 4 * TRIES, generator=generator), (427, 640), 0.05):
        top, left, height, width = box.tolist()
        ours = torch.from_numpy(resized_box(image, box.tolist(), target)).int()
        given = (top, left, height, width, list(target), v2.InterpolationMode.BICUBIC)
        of_image = functional.pil_to_tensor(functional.resized_crop(image, *given))
        of_tensor = functional.resized_crop(tensor, *given)
        assert torch.equal(ours, of_tensor.int())
        assert (
            ours - of_image.int()
        ).float().abs().mean() <= 0.5  # Pillow rounds between its passes


def test_reduced_decoding_of_large_jpegs_is_close(photos, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    large = Image.fromarray(photos[1]).resize((2560, 1708), Image.Resampling.BICUBIC)
    large.save(path, quality=92, exif=_orientation(6))
    generator = torch.Generator().manual_seed(2)
    size = upright_size(open_encoded(path))
    assert size == (2560, 1708)
    drafts, errors = [], []
    for box in random_crops(torch.rand(6, 4 * TRIES, generator=generator), size, 0.2).tolist():
        opened = open_encoded(path)
        found = resized_box(opened, box, (96, 96)).astype(float)
        drafts.append(opened.size)
        whole = ImageOps.exif_transpose(Image.open(path))
        exact = resized_box(whole, box, (96, 96))
        errors.append(np.abs(found - exact).mean())
    assert all(opened != (2560, 1708) for opened in drafts)  # reduced
    assert max(errors) <= 0.5, errors


def _orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def test_ends_of_oblong_images_are_seen() -> None:
    """The outermost columns of a panorama appear in crops as often as torchvision's boxes say."""
    generator = torch.Generator().manual_seed(3)
    boxes = random_crops(torch.rand(4000, 4 * TRIES, generator=generator), (200, 600), 0.2)
    _, left, _, width = boxes.unbind(dim=1)
    assert int(left.min()) == 0 and int((left + width).max()) == 600
    assert float(((left < 100).sum() + (left + width > 500).sum()) / len(boxes)) > 0.3


def batches(images, workers: int, steps: int = 4, views: Views = VIEWS, first: int = 0):
    order = BatchOrder(len(images), 5, seed=1).micro_batches(first, steps, None)
    return list(view_batches(images, order, CPU, views, Loading(workers=workers)))


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(folder: Path) -> None:
    images = open_images(str(folder), SIZE)
    assert images.stored is None and images.labels[:2] == ["a", "a"]
    expected = batches(images, 0)
    for workers in (1, 2):
        found = batches(images, workers)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.rows, other.rows) and torch.equal(one.pixels, other.pixels)
    (last,) = batches(images, 1, first=3)
    assert torch.equal(last.pixels, expected[3].pixels)
    again, _, _, _ = batches(images, 0, views=Views(4, SIZE, 0.2, hflip=True))
    assert not torch.equal(again.pixels, expected[0].pixels)


def test_views_are_crops_of_the_originals(folder: Path) -> None:
    images = open_images(str(folder), SIZE)
    (batch,) = batches(images, 0, steps=1)
    for place, (row, epoch) in enumerate(zip(batch.rows, batch.epochs, strict=True)):
        numbers = VIEWS.numbers(row[None], epoch[None])
        original = Image.open(folder / images.ids[int(row)]).convert("RGB")
        box = random_crops(numbers[:, 1:], (original.height, original.width), 0.2)[0].tolist()
        cut = functional.resized_crop(original, *box, list(SIZE), v2.InterpolationMode.BICUBIC)
        expected = functional.pil_to_tensor(cut)
        expected = expected.flip(2) if numbers[0, 0] < 0.5 else expected
        assert (batch.pixels[place].int() - expected.int()).abs().max() <= 1


def test_decoded_sets_are_cropped_from_their_originals_too(folder: Path) -> None:
    """Sets that are decoded for evaluation: adapt, finetune and the probes train on them."""
    lazy, decoded = open_images(str(folder), SIZE), load_images(str(folder), SIZE)
    assert decoded.shape == (12, 3, *SIZE)
    for one, other in zip(batches(lazy, 0), batches(decoded, 0), strict=True):
        assert torch.equal(one.pixels, other.pixels)
    part = decoded.subset([7, 2, 9])
    assert part.original(1).id == decoded.ids[2]


def test_tiny_images_of_one_size_are_cached_at_their_size(photos, tmp_path: Path) -> None:
    for number in range(4):
        cut = photos[0][number * 40 : number * 40 + 24, :28]
        Image.fromarray(cut).save(tmp_path / f"{number}.png")
    images = open_images(str(tmp_path), SIZE)
    assert images.shape == (4, 3, 24, 28) and images.originals is None
    assert load_images(str(tmp_path), SIZE).shape == (4, 3, *SIZE)
    Image.fromarray(photos[0][:25, :28]).save(tmp_path / "odd.png")
    assert open_images(str(tmp_path), SIZE).stored is None


def test_policies_run_in_workers_for_cached_images_too(photos, tmp_path: Path) -> None:
    for number in range(6):
        Image.fromarray(photos[0][number * 40 :][:32, :32]).save(tmp_path / f"{number}.png")
    images = open_images(str(tmp_path), SIZE)
    inverted = Views(3, SIZE, 0.2, hflip=True, policy=lambda pixels, rows, epochs: 255 - pixels)
    plain = batches(images, 0)
    for workers in (0, 2):
        for one, other in zip(batches(images, workers, views=inverted), plain, strict=True):
            expected = 255 - other.views(VIEWS).round()
            assert one.are_views and torch.equal(one.views(inverted).float(), expected)


# --- broken images ------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """The folder with one file cut short and one that is no image."""
    for path in folder.rglob("*.*"):
        to = tmp_path / "broken" / path.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    cut = tmp_path / "broken" / "b" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "broken" / "a" / "4.png").write_bytes(b"no image")
    return tmp_path / "broken"


def test_unreadable_images_are_replaced_without_changing_others(folder: Path, broken: Path) -> None:
    whole, images = open_images(str(folder), SIZE), open_images(str(broken), SIZE)
    bad = {images.ids.index("b/3.jpg"), images.ids.index("a/4.png")}
    reported: list[tuple[int, str]] = []
    order = BatchOrder(12, 5, seed=1)
    found = view_batches(
        images,
        order.micro_batches(0, 8, None),
        CPU,
        VIEWS,
        Loading(workers=2, on_unreadable=reported.extend),
    )
    for number, (one, other) in enumerate(zip(batches(whole, 0, steps=8), found, strict=True)):
        asked = order(number)[0].tolist()
        for place, row in enumerate(asked):
            replaced = row in bad
            assert (int(other.rows[place]) in bad) is False
            assert (int(other.rows[place]) == row) is not replaced
            assert torch.equal(one.pixels[place], other.pixels[place]) is not replaced
    assert {row for row, _ in reported} == bad
    again = batches(images, 0, steps=8)[-1]
    assert torch.equal(again.pixels, other.pixels)


def test_pretrain_counts_and_lists_what_it_cannot_read(
    broken: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("moce.data.load.LOOKED_AT", 2)
    settings = {**PRETRAIN, "batch_size": 6, "steps": 6}
    result = moce.pretrain(broken, out=tmp_path / "run", **settings)
    assert math.isfinite(result.loss) and result.images == 12
    listed = dict(read_skipped(tmp_path / "run"))
    assert set(listed) == {"b/3.jpg", "a/4.png"} and "not an image" in listed["a/4.png"]
    with pytest.raises(MoceError, match="2 of 12 images cannot be read, more than --max-skipped"):
        moce.pretrain(broken, out=tmp_path / "strict", **settings, max_skipped=0.1)


def test_a_folder_without_any_readable_image_is_one_line(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
    with pytest.raises(MoceError, match="no readable image among the 4 of"):
        open_images(str(tmp_path), SIZE)
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
    Image.new("RGB", (70, 90)).save(tmp_path / "0.jpg")
    images = open_images(str(tmp_path), SIZE).subset(range(1, 40))
    with pytest.raises(MoceError, match="images in a row cannot be read; the last: ValueError"):
        batches(images, 1)


def test_processes_end_well(folder: Path) -> None:
    """One that fails at its end lets torch's own loaders in this program fail, too."""
    images = open_images(str(folder), SIZE)
    order = BatchOrder(len(images), 4, seed=0).micro_batches(0, 3, None)
    with closing(view_batches(images, order, CPU, VIEWS, Loading(workers=2))) as made:
        next(made)
        processes = active_children()
        assert len(processes) == 2 and sum(1 for _ in made) == 2
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.slow
def test_a_killed_worker_is_one_line(folder: Path, monkeypatch) -> None:
    def killed(*given: object) -> None:
        import os

        os._exit(9)

    monkeypatch.setattr(workers_module._Chunks, "_read", killed)
    with pytest.raises(MoceError, match="a process that reads images was killed"):
        batches(open_images(str(folder), SIZE), 1)


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    settings = {**PRETRAIN, "batch_size": 6, "save_every": 2, "steps": 4}
    moce.pretrain(folder, out=tmp_path / "whole", workers=2, **settings)
    moce.pretrain(folder, out=tmp_path / "two", workers=0, **settings)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "two")]
    assert weights[0] == weights[1] and TINY_ARGS["img_size"] == 16
