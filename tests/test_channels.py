"""Images of 1, 4 and 13 channels: decoding, and every command with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builders import CLUSTERS, PRETRAIN, RUNTIME, TINY_ARGS, TRAIN, customize, middle, picture
from PIL import Image

import moce
from moce.data.decode import to_bytes, to_pixels
from moce.data.load import load_images
from moce.errors import MoceError
from moce.weights.from_runs import load_backbone

SIZE = (16, 16)


# --- decoding -------------------------------------------------------------------------------------


def test_gray_and_color_become_one_another() -> None:
    assert middle(to_pixels(picture((90, 90, 90), mode="L"), SIZE, 1)) == [90]
    assert middle(to_pixels(picture((255, 0, 0)), SIZE, 1)) == [76]  # ITU-R 601 luma
    assert middle(to_pixels(np.full((20, 20), 90, np.uint8), SIZE, 3)) == [90] * 3
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 255
    assert middle(to_pixels(red, SIZE, 1)) == [76]


def test_four_channels_are_those_of_an_image_with_alpha() -> None:
    image = Image.new("RGBA", (20, 20), (1, 2, 3, 4))
    assert middle(to_pixels(image, SIZE, 4)) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="4 channels"):
        to_pixels(picture(), SIZE, 4)
    with pytest.raises(ValueError, match="4 channels"):
        to_pixels(picture(mode="CMYK"), SIZE, 4)


def test_other_channels_are_the_arrays_own() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 13), np.uint8)
    assert np.array_equal(to_pixels(pixels, SIZE, 13), pixels.transpose(2, 0, 1))
    for channels in (1, 3, 12):
        with pytest.raises(ValueError, match="13 channels"):
            to_pixels(pixels, SIZE, channels)


def test_many_channels_are_resized_as_colors_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 31, 3), np.uint8)
    assert np.array_equal(to_pixels(pixels, SIZE), to_pixels(Image.fromarray(pixels), SIZE))
    assert np.array_equal(
        to_pixels(np.concatenate([pixels, pixels], 2), SIZE, 6)[3:], to_pixels(pixels, SIZE)
    )


def test_scales_of_values() -> None:
    assert to_bytes(np.array([0, 257 * 200, 65535], np.uint16)).tolist() == [0, 200, 255]
    assert to_bytes(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    assert to_bytes(np.array([False, True])).tolist() == [0, 255]
    assert to_bytes(np.array([0, 65535], np.int32)).tolist() == [0, 255]
    for wrong in ([0.0, 255.0], [np.nan, 0.5], [-1.0, 0.0], [np.inf]):
        with pytest.raises(ValueError, match=r"0\.\.1"):
            to_bytes(np.array(wrong))
    for wrong in (np.array([-1], np.int16), np.array([1], np.int64), np.array([1], np.uint32)):
        with pytest.raises(ValueError, match="convert"):
            to_bytes(wrong)


def test_tiffs_beyond_pillow(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 65536, (13, 16, 16), np.uint16)
    tifffile.imwrite(
        tmp_path / "planes.tif", pixels, photometric="minisblack", planarconfig="separate"
    )
    last = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "last.tif", last, photometric="minisblack", planarconfig="contig")
    images = load_images(str(tmp_path), SIZE, channels=13)
    assert images.ids == ["last.tif", "planes.tif"]
    for found in images.take(slice(None)).numpy():
        assert np.array_equal(found, pixels >> 8)
    with pytest.raises(MoceError, match="13 channels"):
        load_images(str(tmp_path), SIZE)


def test_tiffs_of_four_bands(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 65536, (16, 16, 4), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="minisblack", planarconfig="contig")
    for found in load_images(str(tmp_path), SIZE, channels=4).take(slice(None)).numpy():
        assert np.array_equal(found, pixels.transpose(2, 0, 1) >> 8)


def test_tiffs_without_tifffile_are_skipped_with_the_remedy(tmp_path: Path, monkeypatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((16, 16, 13), np.uint8), photometric="minisblack",
                     planarconfig="contig")  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(MoceError, match=r"moce\[tiff\]"):
        load_images(str(tmp_path), SIZE, channels=13)


# --- the commands -----------------------------------------------------------------------------------


def write_arrays(path: Path, channels: int, count: int = 48) -> Path:
    """Two classes: a bright band, at the top or at the bottom."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (count, 16, 16, channels), np.uint8)
    labels = np.arange(count) % 2
    pixels[labels == 0, :8] += 100
    pixels[labels == 1, 8:] += 100
    np.savez(path, images=pixels, labels=labels)
    return path


SLOW = pytest.mark.slow


@pytest.mark.parametrize("channels", [pytest.param(1, marks=SLOW), pytest.param(4, marks=SLOW), 13])
def test_every_command_takes_other_channels(tmp_path: Path, channels: int) -> None:
    data = write_arrays(tmp_path / "data.npz", channels)
    args = {**TINY_ARGS, "in_chans": channels}
    names = [tmp_path / name for name in ("mae", "clusters", "moce", "backbone", "tuned")]
    mae, clusters, bank, backbone, tuned = names
    moce.pretrain(data, out=mae, epochs=1, **{**PRETRAIN, "model_args": args})
    moce.cluster(data, mae=mae, out=clusters, num_clusters=CLUSTERS, **RUNTIME)
    moce.train(data, mae=mae, clusters=clusters, out=bank, epochs=1, **TRAIN)
    customize(bank, data, out=backbone)
    probed = moce.probe(backbone, data, solver="lbfgs", **RUNTIME)
    assert probed.mean > 0.6
    moce.finetune(backbone, data, out=tuned, epochs=1, batch_size=16, **RUNTIME)
    moce.report(mae, clusters, bank, tuned, out=tmp_path / "report.html")
    assert "reconstructions" in (tmp_path / "report.html").read_text()
    pixels = torch.rand(2, channels, 16, 16)
    ours = load_backbone(str(backbone))
    assert ours.spec.mean == (0.5,) * channels
    theirs = timm.create_model(f"local-dir:{backbone}", pretrained=True).eval()
    expected = ours.vit.eval().forward_features(pixels)[:, 1:].mean(dim=1)
    assert torch.allclose(theirs(pixels), expected, atol=1e-5)
    assert theirs.pretrained_cfg["input_size"] == (channels, 16, 16)


def test_images_with_the_wrong_channels_stop_the_run(tmp_path: Path) -> None:
    data = write_arrays(tmp_path / "data.npz", 4)
    with pytest.raises(MoceError, match="4 channels for an encoder of 3"):
        moce.pretrain(data, out=tmp_path / "mae", epochs=1, **PRETRAIN)
    assert not (tmp_path / "mae").exists()


def test_mean_and_deviation_take_one_value_or_as_many_as_channels(tmp_path: Path) -> None:
    data = write_arrays(tmp_path / "data.npz", 4)
    settings = {**PRETRAIN, "model_args": {**TINY_ARGS, "in_chans": 4}, "epochs": 1}
    moce.pretrain(data, out=tmp_path / "a", mean=0.3, std=[0.1, 0.2, 0.3, 0.4], **settings)
    spec = load_backbone(str(tmp_path / "a")).spec
    assert (spec.mean, spec.std) == ((0.3,) * 4, (0.1, 0.2, 0.3, 0.4))
    with pytest.raises(MoceError, match="--mean has 3 values for 4 channels"):
        moce.pretrain(data, out=tmp_path / "b", mean=[0.1, 0.2, 0.3], **settings)


def test_rand_augment_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    data = write_arrays(tmp_path / "data.npz", 4)
    args = {**TINY_ARGS, "in_chans": 4}
    moce.pretrain(data, out=tmp_path / "mae", epochs=1, **{**PRETRAIN, "model_args": args})
    with pytest.raises(MoceError, match="rand_augment works on images of 3 channels"):
        moce.finetune(tmp_path / "mae", data, out=tmp_path / "t", rand_augment="rand-m9", **RUNTIME)
