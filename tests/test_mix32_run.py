"""Mix-32's images, its driver and its results file, on a few of the embedded images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import pytest
import yaml
from builders import TINY_NAME
from experiments.mix32 import run
from experiments.mix32.build import DEVELOPMENT, HELD_OUT, TaskPlan, pool_rows, subsets, task_rows
from experiments.mix32.collect import merge, read_rows
from experiments.mix32.parts import PICKED_BY, TASKS_OF
from experiments.mix32.synthetic import colored, rendered_letters
from tools.image_sources import CIFAR10, Pool

from moce.data.readers.parquet import demo_table
from moce.evaluation.suite import read_suite

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


def test_the_suite_has_a_task_for_every_plan_and_the_same_roles() -> None:
    roles = {task.name: task.role for task in SUITE.tasks}
    plans = dict.fromkeys(DEVELOPMENT, "development") | dict.fromkeys(HELD_OUT, "held_out")
    assert roles == plans
    assert {task for tasks in TASKS_OF.values() for task in tasks} <= set(roles)
    assert set(PICKED_BY.values()) <= set(DEVELOPMENT)


# --- recipes and results --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "gpu"])
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
    for settings in recipe["methods"].values():
        folders.train(Path("run"), Path("mae"), **settings)
    for change in recipe["ablation"]["changes"]:
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
