"""The estimate of headroom: each group of clusters alone against all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import HEADROOM
from conftest import Runs

import moce
from moce.commands.headroom import split
from moce.errors import MoceError


def test_headroom_compares_each_group_alone_with_all(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moce.commands.headroom.SMALLEST_GROUP", 8)
    found = moce.headroom(
        runs.data, mae=runs.mae, clusters=runs.clusters, out=tmp_path / "h", **HEADROOM
    )
    assert len(found.groups) == 2
    assert sum(group.images for group in found.groups) == 160
    for group in found.groups:
        assert group.gain == pytest.approx(1 - group.error_alone / group.error_all)
    weighted = sum(group.gain * group.images for group in found.groups) / 160
    assert found.gain == pytest.approx(weighted)
    assert json.loads((tmp_path / "h" / "results.json").read_text())["gain"] == found.gain
    assert f"{100 * found.gain:+.2f} %" in found.summary()
    for group in found.groups:
        assert group.passes == pytest.approx(12 * 32 / 144, rel=0.3)
        assert group.worthwhile == (group.gain >= 0.04)


def test_after_less_than_two_passes_headroom_gives_no_verdict(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moce.commands.headroom.SMALLEST_GROUP", 8)
    given = {**HEADROOM, "steps": 4}
    found = moce.headroom(
        runs.data, mae=runs.mae, clusters=runs.clusters, out=tmp_path / "h", **given
    )
    assert found.worthwhile is None
    assert [group.worthwhile for group in found.groups] == [None, None]
    assert "no verdict" in found.summary() and "likely" not in found.summary()
    steps = int(found.summary().split("--steps ")[1].split()[0])
    fewest = min(group.passes for group in found.groups)
    assert fewest * (steps - 1) / 4 < 2 <= fewest * steps / 4


def test_headroom_refuses_groups_too_small_to_tell(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moce.commands.headroom.SMALLEST_GROUP", 200)
    with pytest.raises(MoceError, match="--num-groups"):
        moce.headroom(
            runs.data, mae=runs.mae, clusters=runs.clusters, out=tmp_path / "h", **HEADROOM
        )
    assert not (tmp_path / "h").exists()


def test_held_out_images_are_not_trained_on() -> None:
    held, seen = split(1000, 0)
    assert len(held) == 100
    assert sorted(torch.cat([held, seen]).tolist()) == list(range(1000))
