"""The README.md of an export: facts, metadata for the Hugging Face hub, and code that runs."""

from __future__ import annotations

import re
from contextlib import chdir
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from builders import customize
from huggingface_hub import ModelCard
from PIL import Image
from torch.testing import assert_close

import moce
from moce.customization.model_card import clusters_of, experts_fact, similarity_fact, write_backbone
from moce.customization.selection import route_name
from moce.models.encoder import encode_tokens, pool_tokens
from moce.weights.export import Model
from moce.weights.from_runs import load_mae

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
DENSE = ["timm", "transformers", "torch", pytest.param("onnx", marks=pytest.mark.slow)]


def run_code(card: str, folder: Path) -> dict:
    """The variables after running the card's Python as it stands, in its folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    with chdir(folder), torch.no_grad():
        exec(code, names)
    return names


def features_of(vit, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pool_tokens(vit, encode_tokens(vit, images), "mean")


@pytest.mark.parametrize("kind", DENSE)
def test_the_card_of_a_task_has_facts_and_code_that_loads_it(kind, runs, tmp_path: Path) -> None:
    result = customize(runs.moce, runs.task, tmp_path / "out", format=kind)
    card, choice = (result.folder / "README.md").read_text(), result.choice
    for fact in (
        f"source: {runs.moce.name}",
        f"strategy: {choice.strategy}",
        experts_fact(choice),
        f"clusters: {clusters_of(choice)}",
        f"format: {kind}",
        "3 channels of 16x16 pixels",
        "[0.485, 0.456, 0.406]",
    ):
        assert f"- {fact}" in card or fact in card, fact
    names = run_code(card, result.folder)
    expected = features_of(moce.load(runs.moce).backbone(choice), names["images"])
    assert_close(torch.as_tensor(names["features"]), expected, **CLOSE)
    assert f"- {runs.moce.name} was trained on 160 images" in card
    assert f"moce {version('moce')}, torch {version('torch')}, timm {version('timm')}" in card
    assert "![chart](chart.png)" in card
    with Image.open(result.folder / "chart.png") as chart:
        assert chart.format == "PNG" and chart.width > 300


def test_only_the_card_of_a_route_names_one(runs, tmp_path: Path) -> None:
    bank = moce.load(runs.moce)
    for strategy in ("route", "merge", "generalist"):
        choice = bank.select(str(runs.task), strategy)
        folder = tmp_path / strategy
        folder.mkdir()
        write_backbone(
            folder, "timm", Model(bank.encoder_spec, bank.backbone(choice)), runs.moce, choice
        )
        card = (folder / "README.md").read_text()
        assert ("- route: " in card) == (strategy == "route")
        assert ("- experts: all, averaged by " in card) == (strategy != "route")
        assert f"strategy: {strategy}" in card


def test_a_choice_says_what_its_numbers_are_worth(runs) -> None:
    choice = moce.load(runs.moce).select(str(runs.task))
    few = replace(choice, votes={(0, 0): 3, (1, 0): 1}, share=0.75)
    many = replace(choice, votes={(0, 0): 300, (1, 0): 100}, share=0.75)
    assert few.share_by_chance == pytest.approx((0.301, 0.954), abs=1e-3)  # Wilson's interval
    assert many.share_by_chance == pytest.approx((0.705, 0.790), abs=1e-3)
    far = replace(choice, similarity=0.7, training_similarity=0.8)
    assert far.distance == pytest.approx(1.5)
    assert "1.5 times as far" in similarity_fact(far) and "over 2 times" in similarity_fact(far)


@pytest.mark.parametrize("kind", DENSE)
def test_the_card_of_a_route(kind, runs, tmp_path: Path) -> None:
    bank = moce.load(runs.moce)
    route, count = next(iter(bank.routes.items()))
    folder = moce.export(
        runs.moce, route=route_name(route), format=kind, out=tmp_path / "out"
    ).folder
    card = (folder / "README.md").read_text()
    share = count / sum(bank.routes.values())
    assert f"- source: {runs.moce.name}" in card and "- clusters: " in card
    assert f"- route: {route_name(route)} ({share:.0%} of the training images)" in card
    names = run_code(card, folder)
    expected = features_of(bank.backbone(bank.route_choice(route)), names["images"])
    assert_close(torch.as_tensor(names["features"]), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["timm", "transformers", "torch"])
def test_the_card_of_an_mae(kind: str, runs, tmp_path: Path) -> None:
    folder = moce.export(runs.mae, format=kind, out=tmp_path / "out").folder
    card = (folder / "README.md").read_text()
    assert f"- source: {runs.mae.name}, MAE" in card
    names = run_code(card, folder)
    if kind == "transformers":
        assert names["loss"].isfinite() and type(names["model"]).__name__ == "ViTMAEForPreTraining"
    else:
        vit = load_mae(runs.mae)[1].eval().encoder
        assert_close(names["features"], features_of(vit, names["images"]), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "library"), [("timm", "timm"), ("transformers", "transformers"), ("torch", "timm")]
)
def test_the_metadata_of_a_card_is_valid_and_states_no_license(
    kind: str, library: str, runs, tmp_path: Path
) -> None:
    folder = moce.export(runs.mae, format=kind, out=tmp_path / "out").folder
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == library
    assert data.pipeline_tag == "image-feature-extraction"
    assert "moce" in data.tags and data.license is None
