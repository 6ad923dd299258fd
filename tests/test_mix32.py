"""Mix-32: gains with their intervals, and the page of results drawn from rows made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments.mix32.draw import draw, replaced
from experiments.mix32.figures import by_number
from experiments.mix32.stats import REGRET, compare, gain, spread, task_gains

from moce.errors import MoceError

ROLES = {
    "cifar10": "development",
    "digits": "development",
    "animals": "held_out",
    "vehicles": "held_out",
    "letters": "held_out",
}
ABOVE_MAE = {
    "mae": 0.0,
    "mae_plus": 0.02,
    "token_moe": 0.02,
    "sdr": 0.03,
    "moce": 0.05,
    "moce_random": 0.03,
    "moce_oracle": 0.06,
    "subset_cifar10": 0.07,
}
PAIR = ("moce", "mae_plus", "linear")


def made_rows(
    above: dict[str, float], seeds: int = 3, noise: float = 0.01, **fields: Any
) -> list[dict[str, Any]]:
    """Accuracies of backbones that are better by known amounts; tasks and seeds differ in common."""
    rng = np.random.default_rng(7)
    mark: dict[str, Any] = {"study": "main", "variant": "default", "protocol": "linear"}
    mark |= {"revision": "abc123"}
    mark |= {"metric": "accuracy", "labels": 300, "strategy": None, "route": None, "seconds": 3.2}
    rows = []
    for task, role in ROLES.items():
        for seed in range(seeds):
            common = 0.5 + rng.normal(0, 0.1, 3)  # far larger than the gains: pairing removes it
            for backbone, more in above.items():
                values = (common + more + rng.normal(0, noise, 3)).tolist()
                where = {"seed": seed, "backbone": backbone, "task": task, "role": role}
                rows.append({**mark, **where, "values": values, **fields})
    return rows


def made_measures() -> list[dict[str, Any]]:
    found: list[tuple[str, str, str | None, Any]] = [("purity", "mae", None, 0.95)]
    for backbone, size in (("mae_plus", 100), ("moce", 180)):
        found += [("reconstruction", backbone, d, 0.4) for d in ("mnist", "cifar10")]
        found += [("train_seconds", backbone, None, size), ("parameters", backbone, None, size)]
    found += [("divergence", "moce", block, 0.1) for block in ("1", "3")]
    return [
        {"study": "main", "variant": "default", "seed": seed, "measure": measure}
        | {"backbone": backbone, "where": where, "value": value}
        for seed in range(3)
        for measure, backbone, where, value in found
    ]


def made_results() -> list[dict[str, Any]]:
    """Rows of all studies."""
    rows = made_rows(ABOVE_MAE) + made_rows(ABOVE_MAE, protocol="finetune") + made_measures()
    for row in rows:
        if row.get("protocol") and row["backbone"] == "moce":
            row["votes"] = {"0-1": 0.9, "1-0": 0.1}
    for number, variant in enumerate(("width=64,epochs=30", "width=32,epochs=30")):
        above = {"mae": 0, "mae_plus": 0.02, "only_cifar10": 0.03 + 0.02 * number}
        rows += made_rows(above, study="map", variant=variant)
    for variant in ("num_experts=16", "num_experts=8", "scale=prob"):
        moce = made_rows({"moce": 0.04}, seeds=2, study="ablation", variant=variant)
        rows += [row for row in moce if row["role"] == "development"]
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(folder: Path, rows: list[dict[str, Any]]) -> str:
    page = folder / "docs" / "results.md"
    page.parent.mkdir(exist_ok=True)
    draw(write_rows(folder / "cpu.jsonl", rows), page)
    return page.read_text()


# Gains


def test_the_interval_covers_a_known_gain_and_excludes_zero() -> None:
    found = gain(made_rows({"moce": 0.03, "mae_plus": 0.0}), "moce", "mae_plus", "linear", ROLES)
    assert found and 0 < found.low < 3 < found.high < 5
    assert (found.tasks, found.seeds, found.draws, found.unpaired) == (5, 3, 3, 0)


def test_the_interval_of_no_gain_includes_zero() -> None:
    found = gain(made_rows({"moce": 0.0, "mae_plus": 0.0}), "moce", "mae_plus", "linear", ROLES)
    assert found and found.low < 0 < found.high


def test_intervals_cover_about_as_often_as_they_say() -> None:
    """Over made experiments with luck of tasks, seeds and draws; few levels make it less than 95 %."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(40):
        luck = 0.02 + rng.normal(0, 0.01, (8, 1, 1)) + rng.normal(0, 0.01, (1, 5, 1))
        table = luck + rng.normal(0, 0.01, (8, 5, 3))
        ours = {(f"t{t}", s): table[t, s].tolist() for t in range(8) for s in range(5)}
        theirs = {cell: [0.0] * 3 for cell in ours}
        found = compare(ours, theirs, {task for task, _ in ours})
        covered += bool(found and found.low < 2 < found.high)
    assert covered >= 33


def test_differences_are_paired_before_they_are_averaged() -> None:
    found = gain(made_rows({"moce": 0.03, "mae_plus": 0.0}, noise=0), *PAIR, ROLES)
    assert found and (found.mean, found.low, found.high) == pytest.approx((3, 3, 3))


def test_luck_of_a_seed_is_common_to_all_tasks() -> None:
    """Two seeds 2 points apart on every task: more tasks do not make their mean any surer."""
    ours = {(f"t{t}", s): [0.02 * s] for t in range(20) for s in range(2)}
    found = compare(ours, {cell: [0.0] for cell in ours}, {task for task, _ in ours})
    assert found and (found.mean, found.low, found.high) == pytest.approx((1, 0, 2))


def test_the_order_of_rows_does_not_matter_and_results_repeat() -> None:
    rows = made_rows(ABOVE_MAE)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert gain(rows, *PAIR, ROLES) == gain(shuffled, *PAIR, ROLES)


def test_fixed_tasks_leave_out_the_spread_between_tasks() -> None:
    ours = {(task, s): [0.1 * n] for n, task in enumerate(ROLES) for s in range(3)}
    theirs = {cell: [0.0] for cell in ours}
    fixed, drawn_tasks = (compare(ours, theirs, ROLES, flag) for flag in (True, False))
    assert fixed and fixed.low == pytest.approx(fixed.high)
    assert drawn_tasks and drawn_tasks.low < 15 < 25 < drawn_tasks.high


def test_what_has_no_partner_is_left_out_and_counted() -> None:
    rows = made_rows({"moce": 0.03, "mae_plus": 0.0}, noise=0)
    rows = [r for r in rows if (r["backbone"], r["seed"], r["task"]) != ("moce", 1, "digits")]
    next(r for r in rows if r["task"] == "letters" and r["backbone"] == "moce")["values"].pop()
    found = gain(rows, *PAIR, ROLES)
    assert found and (found.mean, found.low, found.high) == pytest.approx((3, 3, 3))
    assert found.unpaired == 3 + 1
    assert gain(rows, "moce", "absent", "linear", ROLES) is None


def test_gains_per_task_and_regret() -> None:
    rows = made_rows(ABOVE_MAE, seeds=10)
    gains = task_gains(rows, *PAIR, ["digits", "letters", "unknown"])
    assert list(gains) == ["digits", "letters"]
    assert all(found.low < 3 < found.high and found.tasks == 1 for found in gains.values())
    lost = gain(rows, *REGRET, "linear", ROLES)
    assert lost and lost.mean == pytest.approx(1, abs=0.6)


def test_spread_over_seeds() -> None:
    assert spread([1.0]) == (1.0, None)
    assert spread([1.0, 3.0]) == pytest.approx((2, 2**0.5))


# The page


def test_all_sections_are_drawn(tmp_path: Path) -> None:
    text = drawn(tmp_path, made_results())
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert titles == [
        "Gains in points",
        "Known and foreign sources",
        "Every task, linear probe",
        "Every task, fine-tuned",
        "Routes",
        "The map of negative transfer, linear probe",
        "Ablations",
        "Reconstruction",
        "Divergence of the experts",
        "Purity of the clusters",
        "Cost",
    ]
    images = {part.split(")")[0] for part in text.split("](figures/")[1:]}
    assert images == {path.name for path in (tmp_path / "docs" / "figures").iterdir()}
    assert len(images) == 5
    assert text.count("revision abc123") == len(titles)
    assert str(tmp_path) not in text


def test_numbers_in_the_tables(tmp_path: Path) -> None:
    lines = drawn(tmp_path, made_results()).splitlines()
    first = next(line for line in lines if line.startswith("| MoCE − MAE+ | linear probe |"))
    assert first.endswith("| 3, 5 | 3 | 3 | 0 |")
    subset = next(line for line in lines if line.startswith("| subset − MAE+ | linear probe |"))
    assert subset.endswith("| 2, 3 | 3 | 3 | 0 |")  # on cifar10's own tasks only
    variants = [line.split(" |")[0][2:] for line in lines if line.endswith(" | 0, 1 |")]
    assert variants == ["num_experts=8", "num_experts=16", "scale=prob"]
    cells = next(line for line in lines if line.startswith("| task (trained on) |"))
    assert cells.index("width=32") < cells.index("width=64")
    assert "| MoCE | 1.80 ± 0.00 | 1.80 ± 0.00 |" in lines


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    few = {name: ABOVE_MAE[name] for name in ("mae_plus", "moce")}
    rows = made_rows(few, seeds=1)
    rows = [r for r in rows if (r["backbone"], r["task"]) != ("moce", "letters")]
    text = drawn(tmp_path, rows)
    assert "token MoE" not in text and "Ablations" not in text and "Cost" not in text
    assert "| MoCE − MAE+ | linear probe |" in text and "| 2, 4 | 1 | 3 | 3 |" in text
    alone = tmp_path / "alone"
    alone.mkdir()
    assert "Gains" not in drawn(alone, made_rows({"mae": 0.0}))


def test_only_the_part_between_the_marks_is_rewritten(tmp_path: Path) -> None:
    first = drawn(tmp_path, made_rows(ABOVE_MAE))
    page = tmp_path / "docs" / "results.md"
    page.write_text("Before.\n" + first + "After.\n")
    second = drawn(tmp_path, made_rows(ABOVE_MAE))
    assert second == "Before.\n" + first + "After.\n"
    assert replaced("Other page.\n", "mix32 gpu", "## Mix-32, gpu", "new").startswith(
        "Other page.\n\n## Mix-32"
    )
    with pytest.raises(MoceError, match="both marks"):
        replaced("<!-- mix32 cpu begin -->", "mix32 cpu", "## Mix-32", "new")


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="contains no results"):
        draw(tmp_path / "cpu.jsonl", tmp_path / "results.md")


def test_variants_are_ordered_by_number() -> None:
    given = ["w=1,e=3", "e=none", "e=10", "e=2"]
    assert sorted(given, key=by_number) == ["e=2", "e=10", "e=none", "w=1,e=3"]
