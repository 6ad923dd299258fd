"""Images are made to fit an encoder as timm does it, everywhere and in what is exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builders import RUNTIME, TINY_ARGS, TINY_NAME
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config

import moce
from moce.data.decode import to_pixels
from moce.data.load import load_images
from moce.data.loader import in_order
from moce.errors import MoceError
from moce.models.encoder import EncoderSpec, fit_of
from moce.models.fit import Fit, stated_fit
from moce.weights.formats.timm import write_timm_folder
from moce.weights.from_runs import load_backbone

CPU = torch.device("cpu")
STATED = {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "center"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs of different shapes, of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(6):
        photo = load_sample_images().images[number % 2][: 300 - number * 30, number * 40 :]
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(path)
    return root


@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_images_fit_as_timm_makes_them(photos, crop_pct, interpolation, crop_mode, size) -> None:
    mean = (0.5, 0.2, 0.1)
    fit = Fit(size, crop_pct, interpolation, crop_mode, mean)
    transform = create_transform(
        (3, *size),
        is_training=False,
        crop_pct=crop_pct,
        interpolation=interpolation,
        crop_mode=crop_mode,
        mean=mean,
        std=(1.0, 1.0, 1.0),
    )
    for path in photos.rglob("*.png"):
        image = Image.open(path)
        expected = transform(image) + torch.tensor(mean)[:, None, None]
        ours = torch.from_numpy(to_pixels(image, fit)) / 255
        assert torch.allclose(ours, expected, atol=1e-5)


def test_large_jpegs_are_close_to_timms(tmp_path: Path) -> None:
    photo = Image.fromarray(load_sample_images().images[0])
    photo.resize((1920, 1280), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=92)
    opened = Image.open(tmp_path / "a.jpg")
    found = to_pixels(opened, Fit((96, 96), 0.9)).astype(float)
    assert opened.size == (480, 320)
    exact = to_pixels(Image.open(tmp_path / "a.jpg").convert("RGB"), Fit((96, 96), 0.9))
    assert np.abs(found - exact).mean() <= 0.5


def test_what_an_encoder_does_not_state_is_timms_own() -> None:
    base = "vit_tiny_patch16_224"
    with torch.device("meta"):
        assert fit_of(EncoderSpec(base).build()).crop_pct == 0.9
        assert fit_of(EncoderSpec(base, {"img_size": 64}).build()).crop_pct == 1.0
        stated = fit_of(EncoderSpec(base, fit=STATED).build())
    assert (stated.crop_pct, stated.interpolation, stated.size) == (0.8, "bilinear", (224, 224))
    again = EncoderSpec.from_dict(EncoderSpec(base, fit=STATED).to_dict())
    assert again.fit == STATED


@pytest.mark.parametrize(
    "cfg", [{"crop_pct": 0}, {"crop_pct": "x"}, {"interpolation": "best"}, {"crop_mode": "top"}]
)
def test_an_impossible_fit_is_refused(cfg: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(cfg))):
        stated_fit(cfg)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of timm whose images are resized to 20 and cropped to 16, bilinear."""
    folder = tmp_path_factory.mktemp("exported")
    spec = EncoderSpec(TINY_NAME, TINY_ARGS, fit=STATED)
    torch.manual_seed(0)
    write_timm_folder(folder, spec.build(), spec)
    return folder


def test_embed_is_timm_with_the_exported_config(exported: Path, photos: Path, tmp_path) -> None:
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    config = resolve_model_data_config(model)
    assert {name: config[name] for name in STATED} == STATED
    transform = create_transform(**config, is_training=False)
    moce.embed(exported, photos, out=tmp_path / "e.parquet", **RUNTIME)
    table = __import__("pyarrow.parquet").parquet.read_table(tmp_path / "e.parquet").to_pylist()
    for row in table:
        image = Image.open(photos / row["id"]).convert("RGB")
        with torch.inference_mode():
            expected = model(transform(image)[None])[0]
        assert torch.allclose(torch.tensor(row["embedding"]), expected, atol=1e-4)


def test_another_fit_than_the_loaded_one_is_read_from_the_originals(photos: Path) -> None:
    images = load_images(str(photos), Fit((16, 16), 0.9))
    asked = Fit((24, 32), 0.8, "bilinear")
    expected = load_images(str(photos), asked).pixels
    part = images.subset([4, 1])
    assert torch.equal(torch.cat(list(in_order(images, 4, CPU, asked))), expected)
    assert torch.equal(torch.cat(list(in_order(part, 4, CPU, asked))), expected[[4, 1]])
    assert torch.equal(torch.cat(list(in_order(images, 4, CPU, images.fit))), images.pixels)
    (photos / images.ids[0]).rename(photos / "moved")
    try:
        with pytest.raises(MoceError, match=f"cannot read {images.ids[0]}"):
            list(in_order(images, 4, CPU, asked))
    finally:
        (photos / "moved").rename(photos / images.ids[0])


def test_exports_in_other_formats_keep_it(exported: Path, tmp_path: Path) -> None:
    moce.convert(exported, out=tmp_path / "own.safetensors")
    for reference in (exported, tmp_path / "own.safetensors"):
        backbone = load_backbone(str(reference))
        assert backbone.spec.fit == STATED and fit_of(backbone.vit).crop_pct == 0.8
