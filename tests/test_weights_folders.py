"""Transformers' DINOv2, models in several files, preprocessing; facebookresearch/dinov2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from builders import PRETRAIN, batch, shake
from safetensors.torch import load_file, save_file
from test_parity_transformers import reference_of
from test_weights_in import SMALL_DECODER, as_four, dinov2, read, same_loss, save_pth, tiny_mae
from torch.testing import assert_close
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import moce
from moce.errors import MoceError
from moce.models.encoder import encode_tokens
from moce.weights.build import ModelOverrides, build_mae, read_weights
from moce.weights.from_runs import load_mae

FRESH = ModelOverrides(decoder=(16, 1, 2))
SAME = {"atol": 1e-5, "rtol": 1e-5}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
DINOV2 = {
    "plain": (Dinov2Config, Dinov2Model),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    "classifier": (Dinov2Config, Dinov2ForImageClassification),
}


def dinov2_of(kind: str, swiglu: bool):
    config, model = DINOV2[kind]
    torch.manual_seed(0)
    made = model(config(**TINY, use_swiglu_ffn=swiglu, layerscale_value=0.3)).eval()
    shake(made, 0.05)
    return made


def same_tokens(theirs: torch.nn.Module, folder: Path) -> list[str]:
    """Assert that a folder gives the tokens of `theirs`; returns the notes."""
    found, notes = read(folder, FRESH)
    images, _, _ = batch(3)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
    assert_close(encode_tokens(found.encoder, images), expected, **SAME)
    return notes


@pytest.mark.parametrize("form", ["on disk", "in memory", "several files"])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("kind", DINOV2)
def test_dinov2_folders_of_transformers(kind: str, swiglu: bool, form: str, tmp_path: Path) -> None:
    """4.57 and 5.23 write the same names; 5.23 has others in memory."""
    model = dinov2_of(kind, swiglu)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "several files" else "1GB")
    if form == "in memory":
        tensors = {k: v.clone() for k, v in model.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors")
    notes = same_tokens(getattr(model, "dinov2", model), tmp_path)
    assert any("mask token" in note for note in notes)
    assert any("classification head" in note for note in notes) == (kind == "classifier")


def test_dinov2_with_another_activation_is_refused(tmp_path: Path) -> None:
    Dinov2Model(Dinov2Config(**TINY, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(MoceError, match="relu"):
        read_weights(tmp_path)


@pytest.mark.parametrize("size", [(16, 8), (8, 24)])
def test_an_oblong_vit_of_transformers_is_resampled_from_its_own_grid(
    size: tuple[int, int], tmp_path: Path
) -> None:
    config = ViTConfig(**{**TINY, "image_size": size}, layer_norm_eps=1e-6)
    model = ViTModel(config).eval()
    shake(model, 0.05)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, *size)
    found, _ = read(tmp_path, FRESH)
    tokens = model(images).last_hidden_state
    assert_close(encode_tokens(found.encoder, images), tokens, **SAME)
    overrides = ModelOverrides(model_args={"img_size": [32, 16]}, decoder=(16, 1, 2))
    _, notes = read(tmp_path, overrides)
    assert any(f"from {size[0] // 4}x{size[1] // 4} to 8x4 patches" in note for note in notes)


# --- several files ------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    """A ViTMAE in files of at most 40 kB, with their index."""
    reference_of(tiny_mae()).save_pretrained(folder, max_shard_size="40KB")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("form", ["folder", "index", "pickled tensors"])
def test_a_model_in_several_files(form: str, tmp_path: Path) -> None:
    """Transformers 4.x also writes .bin files with an index; 5.x writes safetensors only."""
    index = sharded(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if form == "pickled tensors":
        content = json.loads(index.read_text())
        for path in tmp_path.glob("*.safetensors"):
            torch.save(
                {as_four(k): v for k, v in load_file(path).items()}, path.with_suffix(".bin")
            )
            path.unlink()
        places = content["weight_map"].items()
        content["weight_map"] = {as_four(k): v.replace(".safetensors", ".bin") for k, v in places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()
    found, _ = read(index if form == "index" else tmp_path, ModelOverrides())
    same_loss(found, tiny_mae())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "not an index of weights"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not an index of weights"),
        ({"weight_map": {}}, "not an index of weights"),
        ({"weight_map": [1]}, "not an index of weights"),
        ({"weight_map": {"a": 3}}, "not an index of weights"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        ([1, 2], "not an index of weights"),
        ("{", "cannot read"),
    ],
)
def test_a_wrong_index_is_refused(change: object, message: str, tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(MoceError, match=message):
        read_weights(tmp_path)


def test_a_shard_without_weights_of_the_index_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"].values()))
    content["weight_map"]["vit.more"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(MoceError, match=r"none of its files: vit\.more"):
        read_weights(tmp_path)


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizes", [True, False])
def test_mean_and_std_come_from_the_folder(normalizes: bool, tmp_path: Path) -> None:
    ViTModel(ViTConfig(**TINY)).save_pretrained(tmp_path)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    processor = ViTImageProcessor(do_normalize=normalizes, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path)
    spec, _, _ = build_mae(read_weights(tmp_path), FRESH)
    expected = (mean, std) if normalizes else ([0.0] * 3, [1.0] * 3)
    assert (list(spec.encoder.mean), list(spec.encoder.std)) == expected


# --- facebookresearch/dinov2 -----------------------------------------------------------------------


def chunked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks in chunks of one, numbered over all chunks, as in training checkpoints."""
    names = {}
    for name, value in tensors.items():
        parts = name.split(".")
        names[".".join(["blocks", parts[1], *parts[1:]]) if parts[0] == "blocks" else name] = value
    return names


@pytest.mark.parametrize("form", ["chunked", "teacher"])
def test_training_checkpoints_of_dinov2(form: str, tmp_path: Path) -> None:
    vit, tensors = dinov2(registers=True)
    tensors = chunked(tensors)
    assert "blocks.1.1.attn.qkv.weight" in tensors
    content: dict = tensors
    if form == "teacher":
        heads = {"dino_head.mlp.0.weight": torch.zeros(1), "ibot_head.last.weight": torch.zeros(1)}
        content = {"teacher": {f"backbone.{k}": v for k, v in tensors.items()} | heads}
    found, notes = read(save_pth(tmp_path / "dino.pth", content), SMALL_DECODER)
    images = torch.randn(2, 3, 28, 28)
    expected = vit.forward_features(images)
    assert_close(encode_tokens(found.encoder, images), expected, **SAME)
    heads = "left out what is not in 'backbone.' (2 tensors of dino_head, ibot_head)"
    assert (heads in notes) == (form == "teacher")


def test_dinov2_with_registers_survives_import_training_and_export(runs, tmp_path: Path) -> None:
    """Untrained, the export equals the input; trained, it equals the run."""
    model = dinov2_of("registers", swiglu=True)
    model.save_pretrained(tmp_path / "in")
    images, _, _ = batch(3)
    with torch.no_grad():
        tokens = model(images).last_hidden_state
    out = moce.export(tmp_path / "in", out=tmp_path / "untrained").folder
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert_close(again.forward_features(images), tokens, **SAME)
    settings = {k: v for k, v in PRETRAIN.items() if k not in ("model", "model_args")}
    moce.pretrain(runs.data, out=tmp_path / "run", init=tmp_path / "in", steps=3, **settings)
    _, mae = load_mae(tmp_path / "run")
    expected = mae.eval().encoder.forward_features(images)
    assert (expected - tokens).abs().max() > 1e-3
    for kind in ("timm", "torch"):
        folder = moce.export(tmp_path / "run", format=kind, out=tmp_path / kind).folder
        if kind == "timm":
            found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        else:
            found = build_mae(read_weights(folder), ModelOverrides())[1].eval().encoder
        assert torch.equal(found.forward_features(images), expected)
        assert found.reg_token.shape[1] == 4 and "ls1.gamma" in dict(
            found.blocks[0].named_parameters()
        )
