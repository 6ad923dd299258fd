"""Exported models give the same outputs in other libraries, and the same weights when read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from builders import RUNTIME, batch, customize, tiny_encoder, tiny_mae
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, ViTMAEForPreTraining, ViTModel

import moce
from moce.customization.selection import route_name
from moce.errors import MoceError
from moce.models.encoder import encode_tokens, fit_of, pool_tokens, take
from moce.weights.build import ModelOverrides, build_mae, read_weights
from moce.weights.formats import onnx as onnx_file
from moce.weights.formats.transformers_export import check_vit
from moce.weights.from_runs import load_mae

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def route(runs) -> str:
    return route_name(next(iter(moce.load(runs.moce).routes)))


def features_of(runs, route: str, images: torch.Tensor) -> torch.Tensor:
    bank = moce.load(runs.moce)
    chosen = next(r for r in bank.routes if route_name(r) == route)
    vit = bank.backbone(bank.route_choice(chosen))
    with torch.no_grad():
        return pool_tokens(vit, encode_tokens(vit, images), "mean")


def test_timm_gets_the_features_of_the_route(runs, route: str, tmp_path: Path) -> None:
    folder = moce.export(runs.moce, route=route, out=tmp_path / "out").folder
    images, _, _ = batch(4)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(model(images), features_of(runs, route, images), **CLOSE)
        final, layers = model.forward_intermediates(images)
    assert_close(final[:, 1:].mean(dim=1), features_of(runs, route, images), **CLOSE)
    assert len(layers) == 4 and layers[0].shape == (4, 32, 4, 4)
    card = (folder / "README.md").read_text()
    assert f"route: {route}" in card and "clusters:" in card and "create_model" in card


def test_transformers_gets_the_features_of_the_route(runs, route: str, tmp_path: Path) -> None:
    folder = moce.export(runs.moce, route=route, format="transformers", out=tmp_path / "out").folder
    images, _, _ = batch(4)
    model, info = ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        tokens = model.eval()(pixel_values=images).last_hidden_state
    assert_close(tokens[:, 1:].mean(dim=1), features_of(runs, route, images), **CLOSE)
    assert "last_hidden_state[:, 1:].mean(dim=1)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (40, 40), (16, 16)])
def test_transformers_prepares_photographs_of_any_shape_as_moce_does(
    size: tuple[int, int], runs, tmp_path: Path
) -> None:
    """ViT's own processor would squash them: at 3:1 its features agree to a cosine of 0.56 only."""
    folder = moce.export(runs.backbone, format="transformers", out=tmp_path / "out").folder
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    photographs = [smooth_photograph(size, seed) for seed in range(4)]
    for number, photograph in enumerate(photographs):
        (tmp_path / "in").mkdir(exist_ok=True)
        photograph.save(tmp_path / "in" / f"{number}.png")
    inputs = processor(photographs, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**inputs).last_hidden_state[:, 1:].mean(dim=1)
    file = moce.embed(runs.backbone, tmp_path / "in", out=tmp_path / "f.parquet", **RUNTIME).file
    ours = torch.tensor(pyarrow.parquet.read_table(file)["embedding"].to_pylist())
    agreement = torch.nn.functional.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0))
    assert agreement.min() > 0.99


def smooth_photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """Waves of color whose parts differ, [width x height], so that a squashed one looks different."""
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [
        np.sin(generator.uniform(1, 9, 3) @ np.stack([x, y, x * y]).reshape(3, -1)) for _ in "rgb"
    ]
    pixels = 127 + 120 * np.stack(waves, axis=-1).reshape(size[1], size[0], 3)
    return Image.fromarray(pixels.astype(np.uint8))


def test_vitmae_gets_the_loss_of_an_mae_run(runs, tmp_path: Path) -> None:
    folder = moce.export(runs.mae, format="transformers", out=tmp_path / "out").folder
    model, info = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, mae = load_mae(runs.mae)
    images, noise, _ = batch(4)
    with torch.no_grad():
        theirs, ours = model.eval()(images, noise=noise), mae.eval()(images, noise)
    assert_close(theirs.loss, ours.loss, **CLOSE)
    assert_close(take(theirs.logits, ours.removed), ours.prediction, **CLOSE)


@pytest.mark.slow
def test_onnx_runtime_gets_the_features(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for number, arguments in enumerate(({}, {"reg_tokens": 1, "init_values": 0.1})):
        vit, spec = tiny_mae(**arguments).encoder, tiny_encoder(**arguments)
        folder = tmp_path / str(number)
        folder.mkdir()
        onnx_file.write(folder, vit, spec)
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        for count in (1, 5):
            images, _, _ = batch(count)
            features, tokens = session.run(None, {"images": images.numpy()})
            with torch.no_grad():
                expected = encode_tokens(vit, images)
            assert_close(torch.from_numpy(tokens), expected, atol=1e-4, rtol=1e-4)
            pooled = pool_tokens(vit, expected, "mean")
            assert_close(torch.from_numpy(features), pooled, atol=1e-4, rtol=1e-4)
        assert json.loads((folder / "preprocessing.json").read_text())["input_size"] == [3, 16, 16]


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_an_exported_mae_reads_back_the_same(kind: str, runs, tmp_path: Path) -> None:
    folder = moce.export(runs.mae, format=kind, out=tmp_path / "out").folder
    spec, mae, _ = build_mae(read_weights(folder), ModelOverrides())
    first_spec, first = load_mae(runs.mae)
    own = first.state_dict()
    assert mae.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in mae.state_dict().items())
    assert (spec.mask_ratio, spec.norm_pix) == (first_spec.mask_ratio, first_spec.norm_pix)
    if kind == "torch":
        stated = replace(spec.encoder, fit=first_spec.encoder.fit)
        assert replace(spec, encoder=stated) == first_spec
        assert fit_of(mae.encoder) == fit_of(first.encoder)  # which the export states
        assert "decoder_blocks.0.norm1.weight" in load_file(folder / "model.safetensors")


def test_a_backbone_exported_to_timm_reads_back_the_same(runs, tmp_path: Path) -> None:
    once = moce.export(runs.backbone, out=tmp_path / "once").folder
    before, after = (load_file(f / "model.safetensors") for f in (runs.backbone, once))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_customize_writes_other_formats(runs, tmp_path: Path) -> None:
    result = customize(runs.moce, runs.task, tmp_path / "out", format="transformers")
    assert (result.folder / "selection.json").is_file()
    assert "ViTModel.from_pretrained" in result.load_it
    assert "route:" in (result.folder / "README.md").read_text()


def test_generalist_and_overwrite(runs, tmp_path: Path) -> None:
    for overwrite in (False, True):
        result = moce.export(
            runs.moce, strategy="generalist", out=tmp_path / "out", overwrite=overwrite
        )
    assert "generalist" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"reg_tokens": 2}, "registers"),
        ({"init_values": 0.1}, "LayerScale"),
        ({"class_token": False}, "no class token"),
        ({"qk_norm": True}, "normed queries"),
        ({"no_embed_class": True}, "positions for patches only"),
    ],
)
def test_transformers_refuses_what_it_does_not_support(arguments: dict, part: str) -> None:
    with pytest.raises(MoceError, match=part):
        check_vit(tiny_mae(**arguments).encoder, "ViTModel")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "choose a --route"),
        ({"route": "9-9"}, "no cluster takes"),
        ({"route": "9-9", "strategy": "generalist"}, "leave out --route"),
    ],
)
def test_unknown_routes_are_refused(settings: dict, reason: str, runs, tmp_path) -> None:
    with pytest.raises(MoceError, match=reason):
        moce.export(runs.moce, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_mae_has_no_routes_and_clusters_are_not_exported(runs, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="no experts"):
        moce.export(runs.mae, out=tmp_path / "out", route="0-0")
    with pytest.raises(MoceError, match="clusters"):
        moce.export(runs.clusters, out=tmp_path / "out")
