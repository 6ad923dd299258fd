"""The comparison on dense tasks: its linear layer, what is left to do, and the tables drawn from rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import BLOCKS, EXPERTS, tiny_mae, tiny_spec
from experiments.dense import frozen
from experiments.dense.compare import Cell, cells
from experiments.dense.draw import draw
from experiments.dense.frozen import boxes, centers_of, fitted, linear, mask_of, token_targets
from experiments.mix32.collect import merge

from moce.dense import rle
from moce.dense.composed import write_scenes
from moce.dense.types import Instances
from moce.errors import MoceError
from moce.models.token_moe import TokenMoE, TokenMoESpec
from moce.runs.model import write_model


def made_rows() -> list[dict]:
    """MoCE gains 2 points on kinds and loses 1 on emoji, with every seed and draw."""
    more = {"mae_plus": {"kinds": 0.0, "emoji": 0.0}, "moce": {"kinds": 0.02, "emoji": -0.01}}
    return [
        {
            **vars(cell),
            "metric": "miou",
            "values": [
                0.4 + 0.01 * cell.seed + 0.001 * draw + more[cell.backbone][cell.task]
                for draw in range(3)
            ],
            "revision": "abc",
        }
        for cell in cells("linear", (0, 1, 2))
        if cell.backbone in more and cell.task in ("kinds", "emoji")
    ]


def test_tables_of_gains(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "results.md"
    page.write_text("# Results\n")
    with pytest.raises(MoceError, match="contains no results"):
        draw(rows, page)
    merge(rows, made_rows())
    draw(rows, page)
    text = page.read_text()
    assert "| MoCE | +2.0 | -1.0 | +0.5 | 3 |" in text.replace(" [+2.0, +2.0]", "")
    assert "| MAE+ | 41.1 ± 1.0 | 41.1 ± 1.0 |" in text and "UPerNet\n\nIn" not in text
    draw(rows, page)
    assert page.read_text() == text


def test_cells_are_those_of_every_backbone() -> None:
    found = list(cells("upernet", [1]))
    assert Cell("upernet", "kinds", 1, "mae_plus") in found
    assert not any(cell.backbone == "token_moe" for cell in found)


def test_the_linear_layer_finds_classes_that_are_linear() -> None:
    classes = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (8, 4, 4)))
    shares = torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()
    head = fitted(shares * 2 - 1 + 0.1, shares)
    assert torch.equal(head([shares * 2 - 1 + 0.1]).argmax(1), classes)


def test_objects_become_classes_of_pixels() -> None:
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :2, :3] = masks[1, 3:, 5:] = True
    truth = Instances(
        np.zeros((2, 4), np.float32), np.array([1, 0]), tuple(rle.encode(masks)), np.zeros(2, bool)
    )
    np.testing.assert_array_equal(mask_of(truth), masks[0] * 2 + masks[1] * 1)


def test_token_moe_is_scored_as_plain_vits_are(tmp_path: Path) -> None:
    """Its experts start as copies, so it has to have the score of the MAE that it starts from."""
    for name in ("mae", "token_moe"):
        (tmp_path / name).mkdir()
    mae, spec = tiny_mae(), TokenMoESpec(tiny_spec(), BLOCKS, EXPERTS)
    write_model(tmp_path / "mae", "mae", mae.state_dict(), {"spec": spec.mae.to_dict()})
    experts = TokenMoE(mae, BLOCKS, EXPERTS)
    write_model(tmp_path / "token_moe", "token_moe", experts.state_dict(), {"spec": spec.to_dict()})
    write_scenes(tmp_path / "kinds", "kinds", train=6, val=3, size=32)
    found = [
        linear(tmp_path / run, tmp_path / "kinds", 0, tmp_path) for run in ("mae", "token_moe")
    ]
    assert found[0]["labels"] == 6 and found[0]["values"] == pytest.approx(
        found[1]["values"], abs=0.02
    )


def test_boxes_are_found_where_tokens_tell_them(tmp_path: Path, monkeypatch) -> None:
    """Tokens that say whether they are in an object, and how far its sides are."""

    class Telling:
        patch = 4

        def __init__(self, reference: Path, size: tuple[int, int]) -> None:
            self.centers = centers_of(torch.Size(side // self.patch for side in size), self.patch)

        def __call__(self, images) -> torch.Tensor:
            truth = (images.read(row)[1] for row in range(len(images)))
            found = [token_targets(each, self.centers, self.patch) for each in truth]
            both = [torch.cat([labels[..., None].float(), sides], 2) for labels, sides in found]
            return torch.stack(both).permute(0, 3, 1, 2)

    write_scenes(tmp_path / "digits", "digits", 40, 20, 64)
    monkeypatch.setattr(frozen, "Features", Telling)
    monkeypatch.setattr(frozen, "BOX_RIDGE", 1e-6)
    found = boxes(tmp_path, tmp_path / "digits", 0, tmp_path)
    assert found["metric"] == "box_ap" and found["labels"] == 40
    assert len(found["values"]) == 1 and found["figures"]["box_ap50"] > 0.8
    monkeypatch.setattr(frozen, "box_layer", lambda *_: torch.zeros(6, 4))
    assert boxes(tmp_path, tmp_path / "digits", 0, tmp_path)["values"] == [0]


def test_the_smaller_of_overlapping_objects_has_the_token() -> None:
    large, small = [0.0, 0.0, 16.0, 16.0], [6.0, 6.0, 10.0, 10.0]
    none = np.zeros(2, bool)
    objects = Instances(np.array([small, large], np.float32), np.zeros(2, np.int64), None, none)
    labels, sides = token_targets(objects, centers_of(torch.Size((4, 4)), 4), 4)
    assert labels.sum() == 4 and labels[1:3, 1:3].all()
    assert (sides[1, 1] * 4 + 6).tolist() == small
