"""Decoding, ids, crops, counter-based random numbers, batch order."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import demo_images, middle, picture, write_images
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from moce.data.augment import (
    TRIES,
    augment,
    denormalize,
    normalize,
    random_crops,
    resized_by_products,
    resized_crop,
    resized_one_by_one,
)
from moce.data.decode import to_pixels
from moce.data.load import load_images
from moce.data.loader import BatchOrder, fetch, in_order
from moce.data.rng import Stream, keyed_generator, keyed_uniform
from moce.errors import MoceError

SIZE = (16, 16)
PARITY = 1e-4  # of the range of a pixel: float32 in another order
NOW = torch.zeros(1, dtype=torch.int64)


def uniform(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    rows = torch.arange(count)
    return keyed_uniform(seed, Stream.CROP, torch.zeros_like(rows), rows, columns)


# --- augmentation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(16, 16), (8, 24), (40, 33)])
def test_resized_crop_is_torchvisions(target: tuple[int, int]) -> None:
    pixels = demo_images((32, 48)).pixels[:40]
    boxes = random_crops(uniform(40, 4 * TRIES), (32, 48), 0.05)
    boxes[0] = torch.tensor([0, 0, 32, 48])
    boxes[1] = torch.tensor([31, 47, 1, 1])
    ours = resized_crop(pixels, boxes, target)
    for image, box, result in zip(pixels, boxes.tolist(), ours, strict=True):
        expected = reference.resized_crop(
            image.float(), *box, size=list(target), interpolation=3, antialias=True
        ).clamp(0, 255)
        assert (result - expected).abs().max() < PARITY * 255


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize(
    ("source", "target"),
    [((32, 48), (16, 24)), ((40, 24), (20, 28)), ((18, 18), (16, 16)), ((64, 72), (60, 50))],
)
def test_crop_flip_and_normalization_are_torchvisions(
    channels: int, source: tuple[int, int], target: tuple[int, int]
) -> None:
    """From pixels to the network's input, image by image."""
    pixels = torch.randint(0, 256, (24, channels, *source), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    numbers = uniform(24, 4 * TRIES + 1)
    mean = tuple(0.3 + 0.02 * c for c in range(channels))
    std = tuple(0.2 + 0.01 * c for c in range(channels))
    ours = normalize(augment(pixels, numbers, target, 0.2, True), mean, std)
    boxes = random_crops(numbers[:, 1:], source, 0.2).tolist()
    assert 0 < (numbers[:, 0] < 0.5).sum() < 24
    for image, box, number, result in zip(pixels, boxes, numbers, ours, strict=True):
        expected = reference.resized_crop(
            image.float(), *box, size=list(target), interpolation=3, antialias=True
        )
        expected = expected.clamp(0, 255) / 255
        if number[0] < 0.5:
            expected = reference.horizontal_flip(expected)
        expected = reference.normalize(expected, mean, std)
        assert (result - expected).abs().max() < PARITY


def test_both_ways_to_resize_agree() -> None:
    pixels = torch.randint(0, 256, (16, 3, 40, 56), dtype=torch.uint8)
    boxes = random_crops(uniform(16, 4 * TRIES), (40, 56), 0.05)
    one, other = (way(pixels, boxes, (24, 32)) for way in (resized_one_by_one, resized_by_products))
    assert (one - other).abs().max() < PARITY * 255


def test_whole_image_at_its_own_size_is_untouched() -> None:
    pixels = demo_images().pixels[:4]
    boxes = torch.tensor([[0, 0, 16, 16]]).expand(4, -1)
    assert torch.allclose(resized_crop(pixels, boxes, SIZE), pixels.float(), atol=1e-3)


@pytest.mark.parametrize("smallest", [0.0, 0.08, 0.2, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (20, 64)])
def test_crops_lie_inside_the_image(smallest: float, size: tuple[int, int]) -> None:
    top, left, height, width = random_crops(uniform(5000, 4 * TRIES), size, smallest).unbind(dim=1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()


def test_crops_are_distributed_as_torchvisions() -> None:
    size, scale = (64, 64), 0.2
    boxes = random_crops(uniform(4000, 4 * TRIES), size, scale).double()
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, (scale, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).double()
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert ks_2samp(measure(boxes).numpy(), measure(theirs).numpy()).pvalue > 1e-3


def test_half_of_the_images_are_mirrored_and_nothing_else_changes() -> None:
    pixels = demo_images().pixels.repeat(20, 1, 1, 1)
    numbers = uniform(len(pixels), 4 * TRIES + 1)
    plain, mirrored = (augment(pixels, numbers, SIZE, 0.5, flip) for flip in (False, True))
    flipped = (plain.flip(3) - mirrored).abs().amax(dim=(1, 2, 3)) == 0
    kept = (plain - mirrored).abs().amax(dim=(1, 2, 3)) == 0
    assert (flipped | kept).all()
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_augmentation_of_an_image_does_not_depend_on_its_batch() -> None:
    pixels, numbers = demo_images().pixels[:8], uniform(8, 4 * TRIES + 1)
    together = augment(pixels, numbers, SIZE, 0.2, True)
    alone = torch.cat(
        [augment(pixels[i : i + 1], numbers[i : i + 1], SIZE, 0.2, True) for i in range(8)]
    )
    assert torch.allclose(together, alone, atol=1e-3)


def test_normalize_and_denormalize() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    pixels = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    images = normalize(pixels, mean, std)
    assert images[0, :, 0, 0].tolist() == pytest.approx([-2.0, -1.5, -4 / 3], abs=1e-5)
    assert torch.allclose(denormalize(images, mean, std), pixels / 255)


# --- counter-based random numbers -----------------------------------------------------------------------------


def test_numbers_of_an_image_do_not_depend_on_its_batch() -> None:
    images, epochs = torch.arange(50) * 7, torch.arange(50) % 3
    together = keyed_uniform(5, Stream.MASK, epochs, images, 9)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        keyed_uniform(5, Stream.MASK, epochs[order], images[order], 9), together[order]
    )
    alone = torch.cat(
        [keyed_uniform(5, Stream.MASK, epochs[i : i + 1], images[i : i + 1], 9) for i in range(50)]
    )
    assert torch.equal(alone, together)
    assert torch.equal(keyed_uniform(5, Stream.MASK, epochs, images, 4), together[:, :4])


def test_every_part_of_the_key_matters() -> None:
    def draw(seed=0, stream=Stream.MASK, epoch=0, image=0):
        return keyed_uniform(seed, stream, NOW + epoch, NOW + image, 64)[0]

    base = draw()
    others = [draw(seed=1), draw(stream=Stream.CROP), draw(epoch=1), draw(image=1)]
    # Exchanging two parts of the key gives another key, too.
    others += [draw(epoch=1, image=2), draw(epoch=2, image=1), draw(seed=2), draw(image=2)]
    for number, one in enumerate([base, *others]):
        for other in [base, *others][number + 1 :]:
            assert (one == other).float().mean() < 0.05


def test_numbers_are_uniform() -> None:
    numbers = uniform(2000, 100).numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.bincount((numbers.ravel() * 50).astype(int), minlength=50)
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-squared, 49 degrees of freedom
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.04


def test_streams_epochs_and_neighbors_are_uncorrelated() -> None:
    rows = torch.arange(3000)
    zero = torch.zeros_like(rows)
    columns = [
        keyed_uniform(seed, stream, zero + epoch, rows, 2)
        for seed, stream, epoch in [(0, Stream.MASK, 0), (0, Stream.CROP, 0), (0, Stream.MASK, 1),
                                    (1, Stream.MASK, 0)]
    ]  # fmt: skip
    shifted = keyed_uniform(0, Stream.MASK, zero, rows + 1, 2)
    correlation = np.corrcoef(torch.cat([*columns, shifted], dim=1).T.numpy())
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.08  # 1 / sqrt(3000) = 0.018


def test_generators_depend_on_seed_stream_and_number() -> None:
    def first(*key):
        return torch.rand(4, generator=keyed_generator(*key))

    base = first(0, Stream.ORDER, 0)
    assert torch.equal(base, first(0, Stream.ORDER, 0))
    for key in ((1, Stream.ORDER, 0), (0, Stream.GATE, 0), (0, Stream.ORDER, 1)):
        assert not torch.equal(base, first(*key))


# --- the order of training ------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch() -> None:
    order = BatchOrder(50, 8, seed=3)
    rows, epochs = (torch.cat(part) for part in zip(*(order(s) for s in range(25)), strict=True))
    for epoch in range(4):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(50))
    assert rows[:50].tolist() != rows[50:100].tolist()


def test_balanced_epochs_have_as_many_images_of_each_class() -> None:
    """Of a rare class repeatedly, each time with a number of its own; of a frequent one some."""
    classes = torch.tensor([0] * 40 + [1] * 7 + [2] * 3)
    order = BatchOrder(50, 10, seed=3, classes=classes)
    seen: set[tuple[int, int]] = set()
    drawn = torch.zeros(50, dtype=torch.int64)
    for epoch in range(20):
        pairs = [order(step) for step in range(5 * epoch, 5 * epoch + 5)]
        rows, numbers = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert sorted(classes[rows].bincount().tolist()) == [16, 17, 17]
        assert (numbers % 2**32 == epoch).all()
        assert rows[classes[rows] == 0].unique().numel() == (classes[rows] == 0).sum()
        seen |= set(zip(rows.tolist(), numbers.tolist(), strict=True))
        drawn += rows.bincount(minlength=50)
    assert len(seen) == 20 * 50
    for number in range(3):  # alike within a class
        of_class = drawn[classes == number]
        assert of_class.min() > 0 and of_class.max() < 3 * of_class.float().mean()
    again = BatchOrder(50, 10, seed=3, classes=classes)(17)
    assert torch.equal(again[0], order(17)[0]) and torch.equal(again[1], order(17)[1])


def test_any_step_can_be_made_alone() -> None:
    sequence = BatchOrder(50, 8, seed=3)
    steps = [sequence(step) for step in range(30)]
    for step in (0, 6, 13, 29):
        rows, epochs = BatchOrder(50, 8, seed=3)(step)
        assert torch.equal(rows, steps[step][0]) and torch.equal(epochs, steps[step][1])
    assert not torch.equal(BatchOrder(50, 8, seed=4)(0)[0], steps[0][0])


def test_a_batch_larger_than_the_data_spans_epochs() -> None:
    rows, epochs = BatchOrder(5, 12, seed=0)(0)
    assert rows.shape == (12,)
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2


def test_batches_hold_the_pixels_of_their_rows() -> None:
    images = demo_images()
    rows = torch.tensor([5, 2, 9])
    batch = fetch(images, rows, torch.zeros(3), torch.device("cpu"))
    assert torch.equal(batch.pixels, images.pixels[rows])
    assert torch.equal(
        torch.cat(list(in_order(images, 7, torch.device("cpu"), SIZE))), images.pixels
    )


# --- decoding -------------------------------------------------------------------------------------


def test_gray_cmyk_palette_and_rgb_images_keep_their_color() -> None:
    assert middle(to_pixels(picture(), SIZE)) == [200, 30, 60]
    assert middle(to_pixels(picture((90, 90, 90), mode="L"), SIZE)) == [90, 90, 90]
    assert middle(to_pixels(picture((255, 0, 0), mode="P"), SIZE)) == [255, 0, 0]
    cmyk = middle(to_pixels(picture(mode="CMYK"), SIZE))
    assert np.abs(np.array(cmyk) - [200, 30, 60]).max() <= 3


def test_16_bit_gray_keeps_its_brightness(tmp_path: Path) -> None:
    """A ramp over all 65,536 values becomes a ramp from black to white, not white nearly all over."""
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (32, 1))).save(tmp_path / "ramp.png")
    Image.fromarray(np.tile(ramp, (32, 1))).save(tmp_path / "ramp.tif")
    images = load_images(str(tmp_path), (32, 32))
    for pixels in images.pixels:
        found = pixels[0, 16].float()
        assert (found - torch.linspace(0, 255, 32)).abs().max() <= 2


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert middle(to_pixels(clear, SIZE)) == [255, 255, 255]
    assert middle(to_pixels(half, SIZE)) == pytest.approx([127] * 3, abs=1)
    buffer = io.BytesIO()
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(buffer, "PNG", transparency=0)
    assert middle(to_pixels(Image.open(buffer), SIZE)) == [255, 255, 255]
    assert middle(to_pixels(Image.new("LA", (20, 20), (40, 0)), SIZE)) == [255, 255, 255]


def test_exif_orientation_is_undone(tmp_path: Path) -> None:
    upright = Image.new("RGB", (24, 24), "black")
    upright.paste("white", (0, 0, 24, 12))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = load_images(str(tmp_path), (24, 24)).pixels[0].float()
    assert pixels[:, :10].mean() > 240 and pixels[:, -10:].mean() < 15


def test_images_are_resized_and_cropped_in_the_middle() -> None:
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    pixels = to_pixels(wide, (20, 20))
    assert pixels.shape == (3, 20, 20)
    assert middle(pixels) == [0, 0, 255] and pixels[2].min() > 240
    assert to_pixels(wide, (10, 30)).shape == (3, 10, 30)


def test_broken_images_are_skipped_and_listed(tmp_path: Path) -> None:
    write_images(tmp_path, per_source=2)
    whole = next((tmp_path / "cifar10").glob("*.png")).read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("not even called one")
    images = load_images(str(tmp_path), SIZE)
    assert len(images) == len(images.take(slice(None))) == 8
    assert [name for name, _ in images.skipped] == ["empty.png", "short.png", "text.jpg"]
    assert all(reason for _, reason in images.skipped)
    good = load_images(str(tmp_path / "cifar10"), SIZE)
    rows = torch.tensor([images.ids.index(f"cifar10/{name}") for name in good.ids])
    assert torch.equal(images.take(rows), good.pixels)


def test_identities_are_relative_posix_paths_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/deep/x.PNG", "a.jpeg", "b/y.webp", "c/train/1.png", "c/val/2.gif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    images = load_images(str(tmp_path), SIZE)
    assert images.ids == ["a.jpeg", "b/deep/x.PNG", "b/y.webp", "c/train/1.png", "c/val/2.gif"]
    assert images.labels == [None, "deep", "b", None, None]
    assert images.splits == [None, None, None, "train", "val"]
    assert load_images(str(tmp_path) + "/", SIZE).ids == images.ids


def test_a_broken_image_does_not_copy_a_pixel_file_into_memory(tmp_path, monkeypatch) -> None:
    """Pixels that do not fit into memory stay in their file."""
    write_images(tmp_path / "data", per_source=2)
    (tmp_path / "data" / "broken.png").write_bytes(b"")
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    images = load_images(str(tmp_path / "data"), SIZE, tmp_path / "pixels")
    assert len(images) == 8
    assert not (tmp_path / "pixels").exists()  # unlinked, yet open
    assert images.stored.untyped_storage().nbytes() == 9 * 3 * 16 * 16  # the file's, not a copy


def test_pixels_in_a_file_are_those_in_memory(tmp_path: Path, monkeypatch) -> None:
    write_images(tmp_path / "data", per_source=2)
    usual = load_images(str(tmp_path / "data"), SIZE)
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    stored = load_images(str(tmp_path / "data"), SIZE, tmp_path / "pixels")
    assert torch.equal(usual.pixels, stored.pixels)
    with pytest.raises(MoceError, match="memory"):
        load_images(str(tmp_path / "data"), SIZE)


@pytest.mark.parametrize("data", ["missing", "empty", "file.txt", "bad.parquet", "demo:nothing"])
def test_sources_without_images_are_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    name = data if data.startswith("demo:") else str(tmp_path / data)
    with pytest.raises(MoceError, match=data.split(":")[0]):
        load_images(name, SIZE)


def test_a_folder_of_broken_images_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(MoceError, match="no readable image"):
        load_images(str(tmp_path), SIZE)
