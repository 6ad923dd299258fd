"""Mix-32's images, its driver and its results file, on a few of the embedded images."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.compute
import pyarrow.parquet
import pytest
import yaml
from builders import TINY_NAME
from experiments.mix32 import run
from experiments.mix32.build import (
    DEVELOPMENT,
    HELD_OUT,
    POOLS,
    TaskPlan,
    pool_rows,
    subsets,
    task_rows,
)
from experiments.mix32.collect import merge, read_rows
from experiments.mix32.domains import FAMILIES
from experiments.mix32.draw import draw
from experiments.mix32.foreign import patch
from experiments.mix32.parts import FOREIGN, PICKED_BY, TASKS_OF
from experiments.mix32.scripts import SCRIPTS, Script, character_image
from experiments.mix32.synthetic import colored, rendered_letters
from experiments.mix32.typefaces import Face, missing_characters, packages
from tools.image_sources import CIFAR10, Pool

from moce.data.readers.parquet import demo_table
from moce.evaluation.suite import read_suite

ADAPTED = ("mae_plus_adapted", "moce_adapted")
RECIPES = Path(run.__file__).parent
SUITE = read_suite(run.SUITE, Path())
# Which embedded task stands for a task of Mix-32 here.
STAND_INS = {
    "digits": "digits",
    "colored_digits": "optdigits",
    "cifar10": "animals",
    "fashion": "clothes",
    "twemoji": "emoji",
}


# --- images ---------------------------------------------------------------------------------------


def made_pool(source: str = "cifar10", count: int = 400) -> Pool:
    rng = np.random.default_rng(0)
    return Pool(
        source=source,
        ids=[f"{source}/{n}" for n in range(count)],
        images=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        labels=[CIFAR10[n % 10] for n in range(count)],
        splits=["train" if n < count // 2 else "test" for n in range(count)],
    )


def test_the_pool_takes_training_images_and_tasks_take_the_others() -> None:
    pool = made_pool()
    chosen = [row for _, row in pool_rows({"cifar10": pool}, {"cifar10": 100})]
    assert len(set(chosen)) == 100
    assert max(chosen) < 200
    halves = [task_rows({"cifar10": pool}, TaskPlan("cifar10", CIFAR10, part)) for part in (0, 1)]
    rows = [set(half["train"]) | set(half["test"]) for half in halves]
    assert not rows[0] & rows[1]
    assert all(not set(half["train"]) & set(half["test"]) for half in halves)
    assert min(rows[0] | rows[1]) >= 200


def test_parts_of_the_pool_are_what_they_say() -> None:
    pool = made_pool()
    parts = subsets([(pool, row) for row in range(200)])
    assert len(parts["animate"]) + len(parts["inanimate"]) == len(parts["cifar10"]) == 200
    assert {of.labels[row] for of, row in parts["inanimate"]} == {
        "airplane", "automobile", "ship", "truck"
    }  # fmt: skip


def test_colored_digits_keep_their_shape_and_have_contrast() -> None:
    gray = np.zeros((5, 32, 32), np.uint8)
    gray[:, 8:24, 12:20] = 255
    digits = Pool("mnist", [str(n) for n in range(5)], gray, ["1"] * 5, ["test"] * 5)
    images = colored(digits, 0).images.astype(int)
    assert images.shape == (5, 32, 32, 3)
    assert (np.abs(images[:, 16, 16] - images[:, 0, 0]) >= 89).all()
    assert len({tuple(image[0, 0]) for image in images}) == 5


def test_letters_are_drawn_with_ink() -> None:
    pool = rendered_letters(0)
    assert len(pool.images) == 26 * 120
    spread = pool.images.reshape(len(pool.images), -1).astype(int)
    assert ((spread.max(axis=1) - spread.min(axis=1)) > 60).all()


def test_splits_that_a_source_fixes_are_kept() -> None:
    splits = ["task_train" if n % 4 == 0 else "task_test" for n in range(400)]
    rows = task_rows({"cifar10": replace(made_pool(), splits=splits)}, TaskPlan("cifar10", CIFAR10))
    assert sorted(rows["train"]) == list(range(0, 400, 4))
    assert sorted(rows["test"]) == [n for n in range(400) if n % 4]


def dejavu() -> Face:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return Face("dejavu", path.name, path.read_bytes())


def test_characters_that_a_font_cannot_draw_are_found() -> None:
    assert missing_characters(dejavu(), "Aאあ\u00a0") == "あ\u00a0"
    assert missing_characters(dejavu(), "A\u0391") == "\u0391"  # Greek alpha looks the same


def test_characters_have_ink() -> None:
    script = Script("latin", "abc", (), ())
    images = [character_image("b", script, dejavu(), np.random.default_rng(n)) for n in range(9)]
    for image in images:
        assert image.shape == (32, 32) and image.dtype == np.uint8
        assert np.ptp(image.astype(int)) > 60
    paper = character_image("b", replace(script, paper=True), dejavu(), np.random.default_rng(0))
    assert paper.shape == (32, 32, 3)


def test_typefaces_of_training_test_and_pool_are_apart() -> None:
    of_tasks = [family for s in SCRIPTS.values() for family in s.train + s.test]
    of_pools = {family for families in FAMILIES.values() for family in families}
    assert len(set(of_tasks)) == len(of_tasks)
    assert not of_pools & set(of_tasks)
    assert set(packages()) == of_pools | set(of_tasks)
    assert all(len(set(s.characters)) == len(s.characters) <= 40 for s in SCRIPTS.values())


def test_sources_of_foreign_tasks_are_in_no_pool() -> None:
    sources = {name for pool in POOLS.values() for name in pool}
    plans = {**DEVELOPMENT, **HELD_OUT}
    assert not {plans[task].source for task in FOREIGN} & sources


def test_pictures_of_columns_are_decoded() -> None:
    """Two columns, three rows high: one with two posts, one empty."""
    columns = bytes([0, 1, 0, 7, 0, 2, 1, 0, 9, 0, 255]) + bytes([255])
    header = struct.pack("<HHhhII", 2, 3, 0, 0, 16, 16 + 11)
    colors, drawn = patch(header + columns)
    assert colors.tolist() == [[7, 0], [0, 0], [9, 0]]
    assert drawn.tolist() == [[255, 0], [0, 0], [255, 0]]


def test_the_suite_has_a_task_for_every_plan_and_the_same_roles() -> None:
    roles = {task.name: task.role for task in SUITE.tasks}
    plans = dict.fromkeys(DEVELOPMENT, "development") | dict.fromkeys(HELD_OUT, "held_out")
    assert roles == plans
    assert {task for tasks in TASKS_OF.values() for task in tasks} <= set(roles)
    assert set(PICKED_BY.values()) <= set(DEVELOPMENT)


# --- recipes and results --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "gpu", "cpu_adapted", "cpu_wide"])
def test_the_recipes_name_real_settings_and_every_group_once(name: str) -> None:
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    groups = [g for study in run.STUDIES for g in run.GROUPS[study](recipe)]
    assert len({group.name for group in groups}) == len(groups)
    assert len(recipe["seeds"]) >= 3
    folders = run.Folders(recipe, Path("out"), groups[0])
    asked: list[tuple[str, dict[str, Any]]] = []
    folders._run = lambda command, folder, values, done="": (
        asked.append((command, values)) or folder
    )  # type: ignore[method-assign]
    folders.pretrain(Path("mae"))
    folders.cluster(Path("clusters"), Path("mae"))
    for settings in [*recipe["methods"].values(), *recipe.get("baselines", {}).values()]:
        folders.train(Path("run"), Path("mae"), **settings)
    for change in recipe.get("ablation", {"changes": []})["changes"]:
        kept = {k: v for k, v in change.items() if k not in run.OF_CLUSTERS}
        folders.train(Path("run"), Path("mae"), **{**recipe["methods"]["moce"], **kept})
    from moce.commands.registry import COMMANDS
    from moce.config.load import parse

    for command, values in asked:
        parse(COMMANDS[command].settings, {**recipe["runtime"], **values, "out": "out"})


def test_measuring_again_replaces_and_adds(tmp_path: Path) -> None:
    row = {"study": "main", "variant": "default", "seed": 0, "backbone": "moce"}
    one = {**row, "task": "a", "protocol": "linear", "values": [0.1]}
    other = {**row, "measure": "divergence", "where": "3", "value": 0.2}
    merge(tmp_path / "r" / "x.jsonl", [one, other])
    merge(tmp_path / "r" / "x.jsonl", [{**one, "values": [0.3]}, {**one, "seed": 1}])
    rows = read_rows(tmp_path / "r" / "x.jsonl")
    assert len(rows) == 3
    assert rows[0]["values"] == [0.3]


# --- the driver -----------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Pools and tasks of the embedded images, under Mix-32's names."""
    table = demo_table()
    for name in ("pools", "tasks"):
        (folder / name).mkdir(parents=True)
    pool = table.filter(pyarrow.compute.equal(table["role"].cast("string"), "pretrain")).slice(
        0, 300
    )
    columns = ["id", "image"]
    pyarrow.parquet.write_table(pool.select(columns), folder / "pools" / "all.parquet")
    mnist = pool.filter(pyarrow.compute.equal(pool["source"].cast("string"), "mnist"))
    pyarrow.parquet.write_table(mnist.select(columns), folder / "pools" / "mnist.parquet")
    for name, task in STAND_INS.items():
        rows = table.filter(pyarrow.compute.equal(table["task"].cast("string"), task))
        kept = [
            n for n, split in enumerate(rows["split"].to_pylist()) if split == "train" or n % 6 == 0
        ]
        rows = rows.take(kept)
        rows = rows.select([*columns, "label", "split"])
        pyarrow.parquet.write_table(rows, folder / "tasks" / f"{name}.parquet")


@pytest.mark.slow
def test_a_group_leaves_rows_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((RECIPES / "cpu.yaml").read_text())
    recipe["model"]["model"] = TINY_NAME
    recipe["seeds"], recipe["ablation"]["seeds"] = [], []
    recipe["map"]["cells"] = [{"width": 16, "epochs": 0.5, "steps": 2, "parts": ["mnist"]}]
    file, results = tmp_path / "small.yaml", tmp_path / "small.jsonl"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    write_data(tmp_path / "out" / "data")
    command = ["run", "--recipe", file, "--out", tmp_path / "out", "--results", results]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    run.main()
    rows = read_rows(results)
    probed = {(r["backbone"], r["task"]) for r in rows if "protocol" in r}
    names, tasks = ("mae", "mae_plus", "only_mnist"), ("colored_digits", "digits")
    assert probed == {(name, task) for name in names for task in tasks}
    measured = {(r["backbone"], r["measure"], r["where"]) for r in rows if "measure" in r}
    assert ("only_mnist", "reconstruction", "mnist") in measured
    assert {r["variant"] for r in rows} == {"width=16,epochs=0.5,steps=2"}
    before = results.read_text()
    monkeypatch.setattr(run, "run_group", None)  # nothing is left to do
    run.main()
    assert results.read_text() == before
    assert json.loads(before.splitlines()[0])["study"] == "map"


@pytest.mark.slow
def test_adapted_and_fine_tuned_groups_stand_on_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((RECIPES / "cpu_adapted.yaml").read_text())
    recipe |= {"pretrain": {"epochs": 0.5}, "train": {"steps": 2}, "clusters": {"num_clusters": 8}}
    recipe["further"]["mae_further"]["steps"] = recipe["adapted"]["steps"] = 2
    recipe["experts"]["num_experts"] = 2
    file, results, suite = (tmp_path / f"small{end}" for end in (".yaml", ".jsonl", "_suite.yaml"))
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    small = yaml.safe_load(run.SUITE.read_text()) | {"draws": 1, "labels": 20}
    small["tasks"] = [{"name": "digits", "data": "tasks/digits.parquet", "role": "held_out"}]
    small["finetune"]["epochs"] = 1
    suite.write_text(yaml.safe_dump(small))
    monkeypatch.setattr(run, "SUITE", suite)
    monkeypatch.setattr(run, "measure_run", lambda *_: [])  # needs all of Mix-32's tasks
    write_data(tmp_path / "out" / "data")
    rows = []
    # The last two share a folder: neither may take over what the other asked for.
    for study in ("main", "finetuning", "adapted", "finetuning"):
        (group,) = [group for group in run.GROUPS[study](recipe) if group.seed == 0]
        rows += run.run_group(recipe, tmp_path / "out", group)
        merge(results, rows)
    probed = {row["backbone"] for row in rows if row["study"] in ("main", "adapted")}
    assert probed == {"mae", *recipe["methods"], "mae_further", *recipe["chosen"], *ADAPTED}
    adapted = [row for row in rows if row["study"] == "adapted"]
    assert {row["backbone"] for row in adapted} == set(ADAPTED)
    assert {row["protocol"] for row in adapted} == {"linear"}
    tuned = [row for row in rows if row["study"] == "finetuning"]
    assert {row["backbone"] for row in tuned} == set(recipe["finetuning"])
    assert {row["protocol"] for row in tuned} == {"finetune"}
    page = tmp_path / "page.md"
    draw(results, page)
    assert "MoCE adapted − MAE+ adapted | linear probe" in page.read_text()
    assert "best strategy, cross-fitted − MoCE (regret)" in page.read_text()
