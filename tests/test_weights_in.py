"""Weights of other libraries give the same outputs; everything left out is reported."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from builders import CLUSTERS, PRETRAIN, RUNTIME, TINY_ARGS, TRAIN, batch, shake, tiny_mae
from safetensors.torch import load_file, save_file
from test_parity_transformers import reference_of
from torch.testing import assert_close
from transformers import ViTConfig, ViTMAEModel, ViTModel

import moce
from moce.config import ClusterSettings
from moce.errors import MoceError
from moce.models.encoder import encode_tokens, take
from moce.models.mae import MAE
from moce.weights.build import ModelOverrides, build_mae, read_weights
from moce.weights.formats import mae as facebook
from moce.weights.resolve import start_from

TWO_HEADS = ModelOverrides(model_args={"num_heads": 2}, decoder_heads=2)
SMALL_DECODER = ModelOverrides(model_args={"num_heads": 2}, decoder=(16, 1, 2))
SAME = {"atol": 1e-6, "rtol": 1e-5}


def facebook_tensors(mae: MAE, decoder: bool = True) -> dict[str, torch.Tensor]:
    """The weights of `mae` by the names of facebookresearch/mae."""
    return facebook.join(
        dict(mae.encoder.state_dict()), dict(mae.decoder.state_dict()) if decoder else {}
    )


def save_pth(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def read(path: Path, overrides: ModelOverrides = TWO_HEADS) -> tuple[MAE, list[str]]:
    _, mae, notes = build_mae(read_weights(path), overrides)
    return mae.eval(), notes


def same_loss(one: MAE, other: MAE) -> None:
    images, noise, _ = batch(4)
    assert_close(one(images, noise).prediction, other(images, noise).prediction, **SAME)


# --- facebookresearch/mae ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["wrapped", "bare", "module", "_orig_mod", "safetensors"])
def test_files_of_facebookresearch_mae(form: str, tmp_path: Path) -> None:
    mae = tiny_mae()
    tensors = facebook_tensors(mae)
    assert {"decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "mask_token"} <= tensors.keys()
    if form == "safetensors":
        path = tmp_path / "mae.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    else:
        prefixed = {f"{form}.{k}": v for k, v in tensors.items()}  # by DDP or torch.compile
        content = {"wrapped": {"model": tensors, "epoch": 3}, "bare": tensors}
        path = save_pth(tmp_path / "mae.pth", content.get(form, {"model": prefixed}))
    found, _ = read(path)
    same_loss(found, mae)


def test_an_encoder_alone_gets_a_fresh_decoder_and_a_note(tmp_path: Path) -> None:
    mae = tiny_mae()
    path = save_pth(tmp_path / "mae.pth", {"model": facebook_tensors(mae, decoder=False)})
    found, notes = read(path, SMALL_DECODER)
    images, _, _ = batch(4)
    assert_close(encode_tokens(found.encoder, images), encode_tokens(mae.encoder, images), **SAME)
    assert "no decoder" in notes[-1]


def test_sizes_and_heads_of_vit_base_are_inferred_from_shapes(tmp_path: Path) -> None:
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1)
    path = save_pth(tmp_path / "base.pth", {"model": vit.state_dict()})
    spec, _, _ = build_mae(read_weights(path), ModelOverrides(decoder=(16, 1, 2)))
    arguments = spec.encoder.model_args
    assert (arguments["embed_dim"], arguments["num_heads"], arguments["depth"]) == (768, 12, 1)
    assert (arguments["patch_size"], arguments["img_size"]) == (16, [224, 224])


def test_positions_are_resampled_to_another_image_size(tmp_path: Path) -> None:
    mae = tiny_mae()
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae))
    overrides = ModelOverrides(model_args={"num_heads": 2, "img_size": [24, 16]}, decoder_heads=2)
    found, notes = read(path, overrides)
    assert found.encoder.patch_embed.grid_size == (6, 4)
    assert found.encoder.pos_embed.shape[1] == 25
    assert sum("resampled from 4x4 to 6x4" in note for note in notes) == 2


def test_decoder_heads_can_be_set(tmp_path: Path) -> None:
    mae = tiny_mae()
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae))
    given = {"data": "x", "mae": path, "out": tmp_path / "out", "model_args": {"num_heads": 2}}
    spec, found = start_from(path, ClusterSettings(**given, decoder_heads=2))
    assert spec.decoder_heads == 2
    same_loss(found, mae)
    assert start_from(path, ClusterSettings(**given))[0].decoder_heads == 16


@pytest.mark.parametrize("name", ["junk.pth", "junk.bin", "junk.safetensors"])
def test_a_junk_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(MoceError, match="cannot read weights"):
        read_weights(tmp_path / name)


def test_an_unsuitable_timm_model_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    given = {"data": "x", "mae": "resnet18", "out": tmp_path / "out"}
    with pytest.raises(MoceError, match="resnet18 is a ResNet"):
        start_from("resnet18", ClusterSettings(**given))


def test_a_file_that_needs_pickle_is_refused_and_convert_reads_it(tmp_path: Path, capsys) -> None:
    mae = tiny_mae()
    content = {"model": facebook_tensors(mae), "args": argparse.Namespace(lr=1.0)}
    path = save_pth(tmp_path / "checkpoint.pth", content)
    with pytest.raises(MoceError, match=r"argparse\.Namespace.*--trust-pickle"):
        read_weights(path)
    given = {"out": tmp_path / "out.safetensors", "model_args": {"num_heads": 2}}
    with pytest.raises(MoceError, match="pickle"):
        moce.convert(path, **given)
    result = moce.convert(path, trust_pickle=True, **given)
    assert "args" in capsys.readouterr().err
    assert result.tensors == len(content["model"])
    assert load_file(result.file).keys() == content["model"].keys()
    found, _ = read(result.file)
    same_loss(found, mae)


# --- names and shapes that do not fit ---------------------------------------------------------


def broken(tmp_path: Path, **changes: object) -> Path:
    tensors = facebook_tensors(tiny_mae())
    for name in changes.get("without", ()):
        del tensors[name]
    tensors |= changes.get("extra", {})
    return save_pth(tmp_path / "broken.pth", tensors)


def test_missing_weights_are_listed_and_refused_unless_allowed(tmp_path: Path) -> None:
    path = broken(tmp_path, without=("norm.weight", "decoder_norm.bias"))
    with pytest.raises(MoceError, match=r"missing: decoder\.norm\.bias, norm\.weight"):
        read(path)
    overrides = ModelOverrides({}, {"num_heads": 2}, decoder_heads=2, allow_missing=("*norm.*",))
    _, notes = read(path, overrides)
    assert "start fresh: decoder.norm.bias, norm.weight" in notes[-1]


def test_unexpected_weights_are_listed_and_refused_unless_allowed(tmp_path: Path) -> None:
    path = broken(tmp_path, extra={"dist_token": torch.zeros(1, 1, 32)})
    with pytest.raises(MoceError, match="unexpected: dist_token"):
        read(path)
    overrides = ModelOverrides(
        None, {"num_heads": 2}, decoder_heads=2, allow_unexpected=("dist_*",)
    )
    assert "not used: dist_token" in read(path, overrides)[1][-1]


def test_shapes_that_differ_are_named(tmp_path: Path) -> None:
    path = broken(tmp_path, extra={"blocks.2.norm1.weight": torch.zeros(7)})
    with pytest.raises(MoceError, match=r"blocks\.2\.norm1\.weight \[7\], not \[32\]"):
        read(path)


def test_heads_that_cannot_be_inferred_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="num_heads"):
        read(broken(tmp_path), ModelOverrides())


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1, 2], {"model": {"lr": 1.0}}])
def test_files_without_known_weights_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="holds"):
        read_weights(save_pth(tmp_path / "other.pth", content))


def test_a_corrupt_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mae.pth").write_bytes(b"PK not a zip")
    with pytest.raises(MoceError):
        read_weights(tmp_path / "mae.pth")


# --- Transformers -----------------------------------------------------------------------------


def as_four(name: str) -> str:
    """A decoder's name in Transformers 4.x."""
    return name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")


@pytest.mark.parametrize("version", ["5", "4", "5_in_memory"])
def test_vitmae_folders_of_transformers(version: str, tmp_path: Path) -> None:
    mae = tiny_mae(norm_pix=False)
    reference = reference_of(mae)
    reference.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if version == "4":
        save_file({as_four(k): v for k, v in load_file(weights).items()}, weights)
    if version == "5_in_memory":
        save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, weights)
    found, _ = read(tmp_path, ModelOverrides())
    images, noise, _ = batch(4)
    with torch.no_grad():
        theirs, ours = reference(images, noise=noise), found(images, noise)
    assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert_close(ours.prediction, take(theirs.logits, ours.removed), atol=1e-5, rtol=1e-5)
    same_loss(found, mae)


def test_vit_folders_of_transformers_note_what_is_left_out(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=16, patch_size=4, layer_norm_eps=1e-6, qkv_bias=False,
    )  # fmt: skip
    reference = ViTModel(config).eval()
    shake(reference, 0.05)
    reference.save_pretrained(tmp_path)
    found, notes = read(tmp_path, ModelOverrides(decoder=(16, 1, 2)))
    images, _, _ = batch(4)
    tokens = encode_tokens(found.encoder, images)
    assert_close(tokens, reference(images).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert any("pooler" in note for note in notes)


def test_an_encoder_of_vitmae_alone(tmp_path: Path) -> None:
    mae = tiny_mae()
    reference = reference_of(mae)
    model = ViTMAEModel(reference.config)
    model.load_state_dict(reference.vit.state_dict())
    model.save_pretrained(tmp_path)
    found, _ = read(tmp_path, ModelOverrides(decoder=(16, 1, 2)))
    images, _, _ = batch(2)
    assert_close(encode_tokens(found.encoder, images), encode_tokens(mae.encoder, images), **SAME)


def test_other_models_of_transformers_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MoceError, match="swin"):
        read_weights(tmp_path)


# --- timm and DINOv2 --------------------------------------------------------------------------

FORMS = {
    "registers and LayerScale": {"reg_tokens": 2, "init_values": 0.1},
    "registers without positions": {"reg_tokens": 1, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "no biases": {"qkv_bias": False},
    "normed queries": {"qk_norm": True},
    "oblong patches": {"patch_size": (4, 2), "img_size": (16, 8)},
    "four channels": {"in_chans": 4},
    "odd FFN": {"mlp_ratio": 2.7},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_architecture_of_bare_timm_weights_is_inferred(form: str, tmp_path: Path) -> None:
    arguments = {**TINY_ARGS, **FORMS[form]}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments).eval()
    shake(vit, 0.05)
    path = save_pth(tmp_path / "vit.pth", vit.state_dict())
    found, notes = read(path, SMALL_DECODER)
    size = vit.patch_embed.img_size
    images = torch.randn(2, arguments.get("in_chans", 3), *size)
    assert_close(encode_tokens(found.encoder, images), vit.forward_features(images), **SAME)
    assert any("classification head" in note for note in notes)


def dinov2(registers: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small DINOv2 with the giant's FFN, from timm, and its weights by facebookresearch's names."""
    name = f"vit_giant_patch14{'_reg4' if registers else ''}_dinov2"
    vit = timm.create_model(name, embed_dim=32, depth=2, num_heads=2, img_size=28, patch_size=7)
    shake(vit, 0.05)
    tensors = {
        k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v
        for k, v in vit.state_dict().items()
    }
    tensors["mask_token"] = torch.zeros(1, 32)
    if registers:
        tensors["register_tokens"] = tensors.pop("reg_token")
        cls_position = torch.randn(1, 1, 32)
        tensors["cls_token"] = tensors["cls_token"] - cls_position
        tensors["pos_embed"] = torch.cat([cls_position, tensors["pos_embed"]], dim=1)
    return vit.eval(), tensors


@pytest.mark.parametrize("registers", [True, False])
def test_dinov2_with_swiglu_and_layerscale(registers: bool, tmp_path: Path) -> None:
    vit, tensors = dinov2(registers)
    found, notes = read(save_pth(tmp_path / "dino.pth", tensors), SMALL_DECODER)
    images = torch.randn(2, 3, 28, 28)
    assert_close(encode_tokens(found.encoder, images), vit.forward_features(images), **SAME)
    assert any("mask token" in note for note in notes)
    assert any("no decoder" in note for note in notes)


def test_a_timm_folder_needs_no_other_settings(runs) -> None:
    found, notes = read(runs.backbone, ModelOverrides(decoder=(16, 1, 2)))
    loaded = timm.create_model(f"local-dir:{runs.backbone}", pretrained=True).eval()
    images, _, _ = batch(2)
    tokens = encode_tokens(found.encoder, images)
    assert_close(tokens, loaded.forward_features(images), **SAME)
    assert notes == [f"{runs.backbone} has no decoder: it starts fresh"]


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_start_from_a_file(runs, tmp_path: Path, capsys) -> None:
    tensors = {"model": facebook_tensors(tiny_mae(), decoder=False)}
    path = save_pth(tmp_path / "mae_pretrain.pth", tensors)
    heads = {"model_args": {"num_heads": 2}}
    made = moce.pretrain(
        runs.data, out=tmp_path / "mae", init=str(path), steps=1,
        **{**PRETRAIN, **heads, "model": "vit_base_patch16_224"},
    )  # fmt: skip
    assert "no decoder" in capsys.readouterr().err
    assert made.loss > 0
    clusters = tmp_path / "clusters"
    moce.cluster(runs.data, mae=path, out=clusters, num_clusters=CLUSTERS, **heads, **RUNTIME)
    result = moce.train(
        runs.data, mae=path, clusters=clusters, out=tmp_path / "moce", steps=1, **heads, **TRAIN
    )
    assert "no decoder" in capsys.readouterr().err
    assert result.routes >= 1


def test_the_weights_of_a_run_are_the_run(runs, tmp_path: Path) -> None:
    result = moce.cluster(
        runs.data, mae=runs.mae / "model.safetensors", out=tmp_path / "c", num_clusters=4, **RUNTIME
    )
    assert len(result.sizes) == 4


def test_what_is_neither_run_nor_weights_nor_timm_is_refused(tmp_path: Path, runs) -> None:
    for reference in (tmp_path / "none.pth", "vit_of_nobody"):
        with pytest.raises(MoceError, match=str(reference)):
            moce.cluster(runs.data, mae=reference, out=tmp_path / "c", **RUNTIME)
