"""Fine-tuned models leave in every format, with a card, and serve as backbones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
import timm
import torch
from builders import QUICK_TUNING, RUNTIME, TINY_NAME, batch, customize, shake, tiny_encoder
from huggingface_hub import ModelCard
from test_cards import run_code
from test_weights_in import save_pth
from timm.models import save_for_hf
from torch.testing import assert_close
from transformers import AutoModelForImageClassification

import moce
from moce.data.augment import normalize
from moce.data.load import load_images
from moce.errors import MoceError
from moce.models.encoder import EncoderSpec
from moce.weights.export import Model, check_format, write_model_folder

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def tuned(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    settings = {**QUICK_TUNING, "epochs": 1}
    moce.finetune(runs.backbone, runs.task, out=out, **settings)
    return out


@torch.no_grad()
def logits_of(run: Path, images: torch.Tensor) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    return model(images)


@pytest.mark.parametrize(
    "kind", ["timm", "transformers", "torch", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_a_fine_tuned_model_leaves_in_every_format(kind: str, tuned: Path, tmp_path: Path) -> None:
    folder = moce.export(tuned, format=kind, out=tmp_path / "out").folder
    card = (folder / "README.md").read_text()
    names = run_code(card, folder)
    found = torch.as_tensor(names["logits"])
    assert_close(found, logits_of(tuned, names["images"]), **CLOSE)
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "image-classification"
    classes = json.loads((tuned / "model.json").read_text())["classes"]
    assert f"- {len(classes)} classes: {', '.join(classes)}" in card
    if kind == "transformers":
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert [model.config.id2label[number] for number in range(len(classes))] == classes
    if kind == "timm":
        assert json.loads((folder / "config.json").read_text())["label_names"] == classes


def test_the_run_itself_has_a_card_whose_code_runs(tuned: Path) -> None:
    card = (tuned / "README.md").read_text()
    names = run_code(card, tuned)
    assert_close(names["logits"], logits_of(tuned, names["images"]), **CLOSE)
    row = json.loads((tuned / "rows.jsonl").read_text())
    assert f"accuracy {100 * row['values'][0]:.1f} % on its test images" in card


def test_layerscale_leaves_for_transformers_and_registers_do_not(tmp_path: Path) -> None:
    head = {"num_classes": 5, "global_pool": "avg", "fc_norm": True}
    spec = tiny_encoder(init_values=0.1)
    vit = spec.build(**head).eval()
    shake(vit, 0.1)
    model = Model(spec, vit, classes=list("abcde"), multi_label=True)
    write_model_folder(tmp_path, "transformers", model)
    theirs, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images, _, _ = batch(3)
    with torch.no_grad():
        assert_close(theirs.eval()(images).logits, vit(images), **CLOSE)
    assert theirs.config.problem_type == "multi_label_classification"
    spec = tiny_encoder(reg_tokens=2)
    with pytest.raises(MoceError, match="registers"):
        check_format("transformers", Model(spec, spec.build(**head), classes=list("abcde")))


def features(backbone: object, runs, out: Path) -> torch.Tensor:
    file = moce.embed(backbone, runs.task, out=out, **RUNTIME).file
    return torch.tensor(pyarrow.parquet.read_table(file)["embedding"].to_pylist())


def test_a_fine_tuned_model_is_embedded_by_the_features_under_its_head(
    tuned: Path, runs, tmp_path: Path
) -> None:
    found = features(tuned, runs, tmp_path / "a.parquet")
    model = timm.create_model(f"local-dir:{tuned}", pretrained=True).eval()
    file = moce.embed(runs.backbone, runs.task, out=tmp_path / "b.parquet", **RUNTIME).file
    assert len(found) == len(pyarrow.parquet.read_table(file))
    images = load_images(str(runs.task), (16, 16))
    spec = tiny_encoder()
    with torch.no_grad():
        tokens = model.forward_features(normalize(images.take(slice(None)), spec.mean, spec.std))
        expected = model.forward_head(tokens, pre_logits=True)
    assert_close(found, expected, **CLOSE)
    converted = moce.convert(tuned, out=tmp_path / "c.safetensors")
    assert_close(features(converted.file, runs, tmp_path / "c.parquet"), expected, **CLOSE)


HEADS = {"model_args": {"num_heads": 2}}


def test_a_fine_tuned_model_is_probed_and_fine_tuned_again(tuned: Path, runs, tmp_path) -> None:
    probed = moce.probe(tuned, runs.task, epochs=2, **RUNTIME)
    assert probed.pooling == "mean"
    with pytest.raises(MoceError, match="pooling 'mean'"):
        moce.probe(tuned, runs.task, pooling="cls", epochs=2, **RUNTIME)
    again = moce.finetune(tuned, runs.task, out=tmp_path / "again", **{**QUICK_TUNING, "epochs": 1})
    images, _, _ = batch(2)
    assert logits_of(again.run, images).shape == (2, 3)


def test_no_masked_autoencoder_starts_from_a_fine_tuned_model(
    tuned: Path, runs, tmp_path: Path
) -> None:
    folder = moce.export(tuned, out=tmp_path / "timm").folder
    with pytest.raises(MoceError, match=r"is fine-tuned: .*the backbone that it was made from"):
        moce.cluster(runs.data, mae=folder, out=tmp_path / "c", num_clusters=4, **RUNTIME)


def test_classifiers_of_other_programs_are_exported(tmp_path: Path) -> None:
    """Fine-tuned by facebookresearch/mae's code: a norm after pooling, no config."""
    spec = tiny_encoder()
    vit = spec.build(num_classes=3, global_pool="avg", fc_norm=True).eval()
    shake(vit, 0.1)
    images, _, _ = batch(2)
    path = save_pth(tmp_path / "mae_finetuned.pth", {"model": vit.state_dict()})
    save_for_hf(vit, str(tmp_path / "folder"), safe_serialization=True)
    for number, (given, more) in enumerate(((path, HEADS), (tmp_path / "folder", {}))):
        out = tmp_path / str(number)
        moce.export(given, format="transformers", out=out, **more)
        model = AutoModelForImageClassification.from_pretrained(out).eval()
        with torch.no_grad():
            assert_close(model(images).logits, vit(images), **CLOSE)


# --- provenance and modes -------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, runs, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = moce.export(runs.backbone, out=tmp_path / "out").folder
        moce.convert(runs.mae, out=tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    files = [*folder.iterdir(), tmp_path / "a.safetensors"]
    assert {path.name for path in files} >= {"model.safetensors", "config.json", "README.md"}
    assert {path.stat().st_mode & 0o777 for path in files if path.is_file()} == {0o666 & ~umask}


def test_no_export_says_how_timms_own_weights_crop(tmp_path: Path) -> None:
    """moce crops the middle, whatever timm does for its weights of the same name."""
    spec = EncoderSpec(
        "vit_base_patch16_siglip_224", {**tiny_encoder().model_args, "class_token": True}
    )
    assert timm.create_model(TINY_NAME).pretrained_cfg["crop_mode"] == "center"
    vit = spec.build()
    write_model_folder(tmp_path, "timm", Model(spec, vit))
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["crop_mode"], cfg["crop_pct"]) == ("center", 1.0)


def test_a_customized_backbone_is_read_as_moce_prepares_it(runs, tmp_path: Path) -> None:
    folder = customize(runs.moce, runs.task, tmp_path / "b").folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["crop_mode"], data["crop_pct"], data["interpolation"]) == (
        "center",
        1.0,
        "bicubic",
    )
