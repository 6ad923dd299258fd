"""The README.md of what goes out: what it is, where from, and a call that works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from builders import batch, customize
from torch.testing import assert_close

import moce
from moce.customization.model_card import clusters_of
from moce.customization.selection import route_name
from moce.models.encoder import encode_tokens, pool_tokens
from moce.weights.from_runs import load_mae

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
DENSE = ["timm", "transformers", "torch", pytest.param("onnx", marks=pytest.mark.slow)]


def call_of(card: str, folder: Path, images: torch.Tensor) -> dict:
    """What the card's Python leaves behind, run as it stands but for the folder's name."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {"images": images}
    with torch.no_grad():
        exec(code.replace("THIS_FOLDER", str(folder)), names)
    return names


def features_of(vit, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pool_tokens(vit, encode_tokens(vit, images), "mean")


@pytest.mark.parametrize("kind", DENSE)
def test_the_card_of_a_task_says_what_it_got_and_how_to_load_it(kind, runs, tmp_path: Path) -> None:
    result = customize(runs.moce, runs.task, tmp_path / "out", format=kind)
    card, choice = (result.folder / "README.md").read_text(), result.choice
    for fact in (
        f"source: {runs.moce.name}",
        f"strategy: {choice.strategy}",
        f"route: {route_name(choice.route)} ({choice.share:.0%} of the task's images)",
        f"clusters: {clusters_of(choice)}",
        f"format: {kind}",
        "3 channels of 16x16 pixels",
        "[0.485, 0.456, 0.406]",
    ):
        assert f"- {fact}" in card or fact in card, fact
    assert result.load_it in card.replace("THIS_FOLDER", str(result.folder))
    images, _, _ = batch(3)
    expected = features_of(moce.load(runs.moce).backbone(choice), images)
    found = torch.as_tensor(call_of(card, result.folder, images)["features"])
    assert_close(found, expected, **CLOSE)


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
    images, _, _ = batch(2)
    found = torch.as_tensor(call_of(card, folder, images)["features"])
    assert_close(found, features_of(bank.backbone(bank.route_choice(route)), images), **CLOSE)


@pytest.mark.parametrize("kind", ["timm", "transformers", "torch"])
def test_the_card_of_an_mae(kind: str, runs, tmp_path: Path) -> None:
    folder = moce.export(runs.mae, format=kind, out=tmp_path / "out").folder
    card = (folder / "README.md").read_text()
    assert f"- source: {runs.mae.name}, MAE" in card
    images, _, _ = batch(2)
    left = call_of(card, folder, images)
    if kind == "transformers":
        assert left["loss"].isfinite() and type(left["model"]).__name__ == "ViTMAEForPreTraining"
    else:
        vit = load_mae(runs.mae)[1].eval().encoder
        assert_close(left["features"], features_of(vit, images), **CLOSE)
