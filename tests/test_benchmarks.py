"""Every benchmark runs, on a tiny case, and keeps the rows that the tables are drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks import (
    checkpoints,
    draw,
    finetune_step,
    mae_step,
    measure,
    moce_step,
    probe,
    scaling,
    selection,
    startup,
)
from benchmarks.candidates import CONTENDERS, Case

TIMED = {"candidate", "repeat", "seconds"}
CASE = {"size", "batch", "threads", "precision", "device"}


def rows_of(benchmark: ModuleType, part: str, out: Path) -> list[dict]:
    benchmark.main(["--short", "--only", part, "--repeats", "2", "--out", str(out / "kept.json")])
    found = json.loads((out / "kept.json").read_text())["parts"][part]
    assert found["short"] is True
    assert found["machine"].keys() >= {"cpu", "revision", "load_average", "versions"}
    return found["rows"]


def names(rows: list[dict]) -> set[str]:
    return {row["candidate"] for row in rows}


def test_mae_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name: CONTENDERS[name] for name in ("moce", "Transformers, as it comes")}
    monkeypatch.setattr(mae_step, "CONTENDERS", ours)  # lightly need not be installed
    rows = rows_of(mae_step, "test", tmp_path)
    assert names(rows) == {mae_step.LIMIT, *ours}
    assert all(row.keys() >= TIMED | CASE | {"images_per_s"} for row in rows)
    assert {row["repeat"] for row in rows} == {0, 1}


@pytest.mark.slow  # two processes that import torch
def test_memory_of_a_step_grows_with_the_batch() -> None:
    small, large = (
        measure.in_child(mae_step.peak, Case("tiny32", batch), "moce") for batch in (8, 64)
    )
    assert small > 0
    assert large > small + 20 * measure.MEGABYTE


def test_counted_operations_are_those_of_the_linear_layers_and_some() -> None:
    case = Case("test", 8)
    assert 3 * mae_step.product_flops(case) * 0.9 < mae_step.step_flops(case)
    assert mae_step.step_flops(Case("test", 16)) == 2 * mae_step.step_flops(case)


def test_finetune_step(tmp_path: Path) -> None:
    rows = rows_of(finetune_step, "test", tmp_path)
    assert names(rows) == {finetune_step.WHOLE, finetune_step.CHUNKS}
    assert all(row.keys() >= TIMED | CASE | {"images_per_s"} for row in rows)


def test_moce_step(tmp_path: Path) -> None:
    rows = rows_of(moce_step, "test", tmp_path)
    mixtures = {mixture.name for mixture in moce_step.MIXTURES}
    assert names(rows) >= {moce_step.DENSE, *mixtures}
    assert all(row.keys() >= TIMED | CASE | {"images_per_s"} for row in rows)


@pytest.mark.parametrize(("routes", "counts"), [("balanced", [4] * 4), ("skewed", [8, 4, 2, 2])])
def test_routes_of_the_mixture_are_as_they_are_called(routes: str, counts: list[int]) -> None:
    mixture = moce_step.Mixture(4, routes=routes)
    clusters = moce_step.clusters_of(mixture, 16)
    assert clusters.bincount().tolist() == counts
    model = moce_step.mixture_of(Case("test", 16), mixture)
    assert model.routes()[:, 0].tolist() == [0, 1, 2, 3]


def test_selection(tmp_path: Path) -> None:
    rows = rows_of(selection, "test", tmp_path)
    assert names(rows) == {selection.BARE, selection.SELECT, selection.BRUTE}
    assert all(row.keys() >= TIMED | {"routes", "images", "images_per_s"} for row in rows)


def test_probe(tmp_path: Path) -> None:
    """All minimize the same function, so they are right about as often; scikit-learn as often."""
    rows = rows_of(probe, "test", tmp_path)
    assert names(rows) >= set(probe.CANDIDATES)
    accuracy = {(row["choose"], row["candidate"]): row["accuracy"] for row in rows}
    for choose in (True, False):
        assert accuracy[choose, probe.OURS] == accuracy[choose, probe.SKLEARN] > 0.5
        assert accuracy[choose, probe.TORCH] == pytest.approx(
            accuracy[choose, probe.OURS], abs=0.02
        )


def test_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {what: startup.QUICK[what] for what in (startup.BARE, "import moce")}
    monkeypatch.setitem(startup.SHORT, "import", (quick, 2))
    rows = rows_of(startup, "import", tmp_path)
    assert names(rows) == quick.keys()
    assert all(row.keys() >= TIMED and row["seconds"] > 0 for row in rows)


def test_checkpoints(tmp_path: Path) -> None:
    rows = rows_of(checkpoints, "test", tmp_path)
    assert names(rows) == {
        checkpoints.COPY, checkpoints.WAITS, checkpoints.DONE, checkpoints.WHOLE
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["mb"] > 0 for row in rows)


@pytest.mark.slow  # a process for each of two sizes
@pytest.mark.parametrize("part", scaling.PARTS)
def test_scaling(part: str, tmp_path: Path) -> None:
    rows = rows_of(scaling, part, tmp_path)
    assert [row["images"] for row in rows] == [500, 2000]
    assert all(row["seconds"] > 0 and row["peak_mb"] >= 0 for row in rows)


def test_exponents_are_slopes() -> None:
    rows = [{"images": n, "seconds": 3.0 * n**1.1} for n in (10, 1000, 100000)]
    assert scaling.exponent(rows, "seconds") == pytest.approx(1.1)


def test_parts_are_kept_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for part in ("one", "two", "one"):
        measure.keep(path, part, [{"seconds": 1.0}], ("torch",), short=False)
    assert json.loads(path.read_text())["parts"].keys() == {"one", "two"}


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SystemExit, match="no part 'three'"):
        measure.chosen("one,three", {"one": 1})


def test_the_page_is_what_the_kept_numbers_draw() -> None:
    page = draw.PAGE.read_text()
    assert draw.drawn(page) == page
