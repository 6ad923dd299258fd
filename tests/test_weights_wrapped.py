"""Weights as people's files have them: prefixes, wrappers, several networks, DeiT, plain backbones."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pyarrow.parquet
import pytest
import timm
import torch
from builders import RUNTIME, TINY_ARGS, TINY_NAME, batch, shake, tiny_mae
from safetensors.torch import load_file, save_file
from test_weights_in import SAME, SMALL_DECODER, facebook_tensors, read, same_loss, save_pth
from timm.models import save_for_hf
from torch import nn
from torch.testing import assert_close
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import moce
from moce.errors import MoceError
from moce.models.encoder import encode_tokens
from moce.weights.build import ModelOverrides, build_mae, read_weights
from moce.weights.from_runs import load_backbone

TWO_HEADS = {"model_args": {"num_heads": 2}}


def timm_vit(seed: int = 0, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    vit = timm.create_model(TINY_NAME, **{**TINY_ARGS, "num_classes": 3, **arguments}).eval()
    shake(vit, 0.05)
    return vit


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: value for name, value in tensors.items()}


def same_as(vit: nn.Module, found) -> None:
    images, _, _ = batch(3)
    with torch.no_grad():
        assert_close(encode_tokens(found, images), vit.forward_features(images), **SAME)


# --- prefixes and wrappers ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.module.",
        "module._orig_mod.module.",
        "model.",
        "backbone.vit.",
        "module.base_encoder.",
        "net.encoder.",
    ],
)
def test_prefixes_in_any_order_and_number(prefix: str, suffix: str, tmp_path: Path) -> None:
    vit = timm_vit()
    tensors = prefixed(prefix, dict(vit.state_dict())) | {"projector.weight": torch.zeros(1)}
    path = tmp_path / f"a{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else save_pth(path, tensors)
    found, notes = read(path, SMALL_DECODER)
    same_as(vit, found.encoder)
    assert any("left out" in note and "projector" in note for note in notes)


def test_what_wraps_single_layers_is_no_part_of_their_names(tmp_path: Path) -> None:
    """As torch.compile, FSDP and activation checkpointing of single blocks leave them."""
    mae = tiny_mae()
    names = {
        name: name.replace("blocks.1.", "blocks.1._orig_mod.")
        .replace("blocks.2.", "_fsdp_wrapped_module.blocks.2._checkpoint_wrapped_module.")
        for name in facebook_tensors(mae)
    }  # fmt: skip
    tensors = {names[name]: value for name, value in facebook_tensors(mae).items()}
    found, _ = read(save_pth(tmp_path / "mae.pth", {"model": tensors}))
    same_loss(found, mae)


@pytest.mark.parametrize("keys", [["net"], ["ema"], ["a", "b", "c"], ["state_dict", "model"]])
def test_wrappers_of_any_name(keys: list[str], tmp_path: Path) -> None:
    mae = tiny_mae()
    content: dict = facebook_tensors(mae)
    for key in reversed(keys):
        content = {
            key: OrderedDict(content),
            "optimizer": {"state": {0: torch.zeros(2)}},
            "lr": 0.1,
        }
    found, notes = read(save_pth(tmp_path / "mae.pth", content))
    same_loss(found, mae)
    assert any("optimizer" in note for note in notes)


@pytest.mark.parametrize(
    ("keys", "choice"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("student", "teacher"), "teacher"),
    ],
)
def test_of_several_networks_the_user_chooses(keys, choice: str, runs, tmp_path: Path) -> None:
    vits = {key: timm_vit(seed) for seed, key in enumerate(keys)}
    content = {key: prefixed("module.", dict(vit.state_dict())) for key, vit in vits.items()}
    path = save_pth(tmp_path / "a.pth", {**content, "epoch": 3})
    with pytest.raises(MoceError, match=rf"{keys[0]}, {keys[1]}; choose one by --weights-key"):
        read_weights(path)
    with pytest.raises(MoceError, match="no network named 'other'"):
        read_weights(path, "other")
    converted = moce.convert(path, out=tmp_path / "a.safetensors", weights_key=choice, **TWO_HEADS)
    same_as(vits[choice], load_backbone(str(converted.file)).vit)
    given = {"weights_key": choice, **TWO_HEADS, **RUNTIME}
    moce.cluster(runs.data, mae=path, out=tmp_path / "c", num_clusters=4, **given)


def test_networks_that_differ_by_prefix(tmp_path: Path) -> None:
    """MoCo v3 keeps its momentum encoder beside the base encoder."""
    vits = {name: timm_vit(seed) for seed, name in enumerate(("base_encoder", "momentum_encoder"))}
    tensors: dict = {}
    for name, vit in vits.items():
        tensors |= prefixed(f"module.{name}.", dict(vit.state_dict()))
    path = save_pth(tmp_path / "moco.pth", {"state_dict": tensors})
    with pytest.raises(MoceError, match="networks: base_encoder, momentum_encoder"):
        read_weights(path)
    for name, vit in vits.items():
        found, _ = build(path, name)
        same_as(vit, found.encoder)


def build(path: Path, key: str | None = None):
    _, mae, notes = build_mae(read_weights(path, key), SMALL_DECODER)
    return mae.eval(), notes


def test_a_copy_of_a_runs_weights_has_its_decoder(runs, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes((runs.mae / "model.safetensors").read_bytes())
    found, _ = read(path)
    own, _ = read(moce.convert(runs.mae, out=tmp_path / "own.safetensors").file)
    same_loss(found, own)


def test_whole_pickled_models_are_converted(tmp_path: Path) -> None:
    vit = timm_vit()
    path = save_pth(tmp_path / "whole.pth", {"model": vit, "epoch": 1})
    with pytest.raises(MoceError, match=rf"moce convert {path} --out .*--trust-pickle"):
        read_weights(path)
    given = {"out": tmp_path / "whole.safetensors", "trust_pickle": True, **TWO_HEADS}
    same_as(vit, load_backbone(str(moce.convert(path, **given).file)).vit)


def test_convert_checks_what_init_checks(tmp_path: Path) -> None:
    tensors = facebook_tensors(tiny_mae())
    del tensors["norm.weight"]
    path = save_pth(tmp_path / "mae.pth", {**tensors, "extra": torch.zeros(1)})
    out = tmp_path / "out.safetensors"
    with pytest.raises(MoceError, match=r"missing: norm\.weight .*unexpected: extra"):
        moce.convert(path, out=out, **TWO_HEADS)
    assert not out.exists()
    allowed = {"allow_missing": ["norm.*"], "allow_unexpected": ["extra"]}
    moce.convert(path, out=out, **allowed, **TWO_HEADS)
    read(out, ModelOverrides(decoder_heads=2))  # the number of heads is in the file


def test_guessed_heads_are_printed(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1, img_size=16)
    load_backbone(str(save_pth(tmp_path / "small.pth", vit.state_dict())))
    printed = capsys.readouterr().err
    assert "6 attention heads, as usual for width 384: a guess" in printed
    assert "does not say how images were normalized" in printed


# --- DeiT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "folder"])
def test_deit_with_distillation_gives_its_own_features(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = {k: v for k, v in TINY_ARGS.items() if k != "img_size"}
    deit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, **args).eval()
    shake(deit, 0.05)
    if form == "file":
        path = save_pth(tmp_path / "deit.pth", {"model": deit.state_dict()})
    else:
        save_for_hf(deit, str(tmp_path / "deit"), safe_serialization=True)
        path = tmp_path / "deit"
    found, notes = read(
        path, SMALL_DECODER if form == "file" else ModelOverrides(decoder=(16, 1, 2))
    )
    same_as(deit, found.encoder)
    assert any("kept as a register" in note for note in notes)


def test_deit_of_transformers(tmp_path: Path) -> None:
    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=16, patch_size=4, layer_norm_eps=1e-6, num_labels=3,
    )  # fmt: skip
    deit = DeiTForImageClassificationWithTeacher(config).eval()
    shake(deit, 0.05)
    deit.save_pretrained(tmp_path)
    found, _ = read(tmp_path, ModelOverrides(decoder=(16, 1, 2)))
    images, _, _ = batch(3)
    with torch.no_grad():
        expected = deit.deit(images).last_hidden_state
    assert_close(encode_tokens(found.encoder, images), expected, atol=1e-5, rtol=1e-5)


# --- folders whose defaults are left out ----------------------------------------------------------


def without_defaults(folder: Path, *kept: str) -> None:
    """config.json with what differs from Transformers' defaults only, as older versions write it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: config[name] for name in ("model_type", *kept)}))


def test_a_vit_of_transformers_without_its_defaults(tmp_path: Path) -> None:
    """Twelve heads are Transformers' default, whatever the width."""
    config = ViTConfig(hidden_size=48, num_hidden_layers=1, intermediate_size=64)
    model = ViTModel(config, add_pooling_layer=False).eval()
    shake(model, 0.05)
    model.save_pretrained(tmp_path)
    without_defaults(tmp_path, "hidden_size", "num_hidden_layers", "intermediate_size")
    backbone = load_backbone(str(tmp_path))
    assert backbone.vit.blocks[0].attn.num_heads == 12
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(images).last_hidden_state
    assert_close(encode_tokens(backbone.vit, images), expected, atol=1e-4, rtol=1e-4)


def test_a_vitmae_of_transformers_without_its_defaults(tmp_path: Path) -> None:
    """Its targets are not normed by default, and its decoder has 16 heads."""
    config = ViTMAEConfig(
        hidden_size=48, num_hidden_layers=1, intermediate_size=64, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_intermediate_size=128,
    )  # fmt: skip
    ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    without_defaults(tmp_path, "image_size", "decoder_intermediate_size")
    spec, mae, _ = build_mae(read_weights(tmp_path), ModelOverrides())
    assert (spec.norm_pix, spec.mask_ratio, spec.decoder_heads) == (False, 0.75, 16)
    assert mae.encoder.blocks[0].attn.num_heads == 12


def test_a_folder_of_an_older_timm_has_no_model_args(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2).eval()
    save_for_hf(vit, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("model_args", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(str(tmp_path))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(encode_tokens(backbone.vit, images), vit.forward_features(images), **SAME)
    assert backbone.spec.mean == tuple(config["pretrained_cfg"]["mean"])


# --- where a backbone is asked for ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "transformers", "torch", "run's weights", "timm"])
def test_embed_takes_weights_of_any_format(form: str, runs, tmp_path: Path) -> None:
    if form == "file":
        path = moce.convert(runs.mae, out=tmp_path / "mae.safetensors").file
    elif form == "run's weights":
        path = runs.mae / "model.safetensors"
    else:
        path = moce.export(runs.mae, format=form, out=tmp_path / "out").folder
    features = [
        pyarrow.parquet.read_table(
            moce.embed(b, runs.task, out=tmp_path / f"{n}.parquet", **RUNTIME).file
        )["embedding"].to_pylist()
        for n, b in enumerate((runs.mae, path))
    ]
    assert_close(torch.tensor(features[1]), torch.tensor(features[0]), atol=1e-5, rtol=1e-5)
    assert len(load_file(runs.mae / "model.safetensors")) > 0
