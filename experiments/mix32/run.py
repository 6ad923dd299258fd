"""Run Mix-32: the map of negative transfer, the comparison of methods and the ablations.

    python -m experiments.mix32.run --recipe experiments/mix32/cpu.yaml --out runs/mix32 --jobs 2

Every group (one seed of the comparison, one cell of the map, some ablations) is a chain of moce's
commands in folders of its own; finished folders are passed over and interrupted ones resumed, so the
same command continues after an interruption. `--studies` and `--seeds` pick groups. The rows of a finished
group are merged into `results/RECIPE.jsonl`, and a group whose rows are there is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

import moce
from experiments.mix32.collect import evaluation_rows, merge, read_rows
from experiments.mix32.measure import measure_run
from experiments.mix32.parts import PICKED_BY, TASKS_OF

HERE = Path(__file__).parent
SUITE = HERE.parents[1] / "recipes" / "suites" / "mix32.yaml"
ROUTED = ("moce", "sdr", "token_moe")
STUDIES = ("map", "main", "adapted", "finetuning", "baselines", "ablation")
OF_CLUSTERS = ("num_clusters", "pooling", "update", "epsilon")


@dataclass(frozen=True)
class Group:
    """What one process does in one go. name: unique, and the folder's."""

    study: str
    name: str
    seed: int
    options: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.name)


class Folders:
    """Recipe, data and run folders of one group."""

    def __init__(self, recipe: dict[str, Any], out: Path, group: Group) -> None:
        self.recipe, self.out, self.group = recipe, out, group
        self.base = out / group.name

    @property
    def main(self) -> Path:
        """Where the runs of the main comparison with this seed are."""
        return self.out / "main" / str(self.group.seed)

    @property
    def finetuning(self) -> dict[str, Any]:
        """What `evaluate` is asked for to fine-tune on the held-out tasks."""
        draws = self.recipe.get("finetune_draws", 3)
        return {"protocols": ("finetune",), "role": "held_out", "finetune_draws": draws}

    def pool(self, name: str) -> str:
        return str(self.out / "data" / "pools" / f"{name}.parquet")

    def task(self, name: str) -> str:
        return str(self.out / "data" / "tasks" / f"{name}.parquet")

    def pretrain(self, folder: Path, **changes: Any) -> Path:
        settings = {**self.recipe["model"], **self.recipe["training"], **self.recipe["pretrain"]}
        return self._run("pretrain", folder, {"data": self.pool("all"), **settings, **changes})

    def cluster(self, folder: Path, mae: Path, **changes: Any) -> Path:
        settings = {"data": self.pool("all"), "mae": mae, **self.recipe["clusters"]}
        return self._run("cluster", folder, {**settings, **changes})

    def train(self, folder: Path, mae: Path, method: str, **changes: Any) -> Path:
        settings = {**self.recipe["training"], **self.recipe["train"]}
        settings |= {"data": self.pool("all"), "mae": mae, "method": method}
        settings |= self.recipe["experts"] if method in ROUTED else {}
        return self._run("train", folder, {**settings, **changes})

    def evaluate(
        self, folder: Path, backbones: dict[str, str], done: str = "results.md", **changes: Any
    ) -> Path:
        """done: the file that says that nothing is left to do; none if more may be asked for."""
        named = tuple(f"{name}={reference}" for name, reference in backbones.items())
        settings = {"suite": SUITE, "root": self.out / "data", "backbones": named, **changes}
        return self._run("evaluate", folder, settings, done)

    def _run(
        self, command: str, folder: Path, values: dict[str, Any], done: str = "model.json"
    ) -> Path:
        if not (done and (folder / done).is_file()):
            started = (folder / "config.yaml").is_file()
            given = {**self.recipe["runtime"], "seed": self.group.seed, **values, "out": folder}
            getattr(moce, command)(**given, **({"resume": True} if started else {}))
        return folder


# The studies


def map_groups(recipe: dict[str, Any]) -> Iterator[Group]:
    """Cells of the map: the MAE trained on, on all images or on a part of them, for as many steps."""
    for cell in recipe.get("map", {"cells": []})["cells"]:
        name = ",".join(f"{key}={value}" for key, value in cell.items() if key != "parts")
        for seed in recipe["map"]["seeds"]:
            yield Group("map", f"map/{name}/{seed}", seed, {"variant": name, **cell})


def run_map(work: Folders) -> list[dict[str, Any]]:
    options, base, recipe = work.group.options, work.base, work.recipe
    arguments = {**recipe["model"]["model_args"], "embed_dim": options["width"]}
    mae = work.pretrain(base / "mae", model_args=arguments, epochs=options["epochs"])
    steps = options["steps"]
    runs = {"mae": mae, "mae_plus": work.train(base / "mae_plus", mae, "mae", steps=steps)}
    for part in options["parts"]:
        folder = base / f"only_{part}"
        runs[f"only_{part}"] = work.train(folder, mae, "mae", data=work.pool(part), steps=steps)
    backbones = {name: str(folder) for name, folder in runs.items()}
    own = {task for part in options["parts"] for task in TASKS_OF[part]}
    folder = work.evaluate(base / "evaluation", backbones, tasks=tuple(sorted(own)))
    rows = evaluation_rows(folder)
    for name, run in runs.items():
        rows += measure_run(run, name, work.out / "data", None)
    return rows


def main_groups(recipe: dict[str, Any]) -> Iterator[Group]:
    for seed in recipe["seeds"]:
        yield Group("main", f"main/{seed}", seed, {"variant": "default"})


def run_main(work: Folders) -> list[dict[str, Any]]:
    base, recipe = work.base, work.recipe
    mae = work.pretrain(base / "mae")
    clusters = work.cluster(base / "clusters", mae)
    runs = {"mae": mae} | train_methods(work, recipe["methods"], base)
    for name, settings in recipe.get("further", {}).items():
        changes = {key: value for key, value in settings.items() if key != "from"}
        runs[name] = work.train(base / name, runs[settings["from"]], "mae", **changes)
    references = {name: str(folder) for name, folder in runs.items()}
    chosen = {name: f"{runs[of]}@{how}" for name, (of, how) in recipe["chosen"].items()}
    rows = evaluation_rows(work.evaluate(base / "evaluation", {**references, **chosen}))
    if tuned := {name: references[name] for name in recipe["finetuned"]}:
        rows += evaluation_rows(work.evaluate(base / "finetuning", tuned, **work.finetuning))
    for source in recipe["subsets"]:
        name = f"subset_{source}"
        task = work.task(PICKED_BY[source])
        runs[name] = work.train(base / name, mae, "subset", clusters=clusters, task=task)
        folder = base / f"evaluation_{name}"
        own = work.evaluate(folder, {name: str(runs[name])}, tasks=TASKS_OF[source])
        rows += evaluation_rows(own)
    for name, run in runs.items():
        rows += measure_run(run, name, work.out / "data", clusters)
    return rows


def train_methods(work: Folders, methods: dict[str, Any], base: Path) -> dict[str, Path]:
    """Train each method, by name, from the MAE of the main comparison."""
    mae, clusters = work.main / "mae", work.main / "clusters"
    runs = {}
    for name, settings in methods.items():
        needs = {"clusters": clusters} if settings["method"] in ("moce", "sdr") else {}
        runs[name] = work.train(base / name, mae, **settings, **needs)
    return runs


def groups_per_seed(study: str, recipe: dict[str, Any]) -> Iterator[Group]:
    """Groups of a study that stands on the runs of the main comparison; none if the recipe lacks it."""
    if recipe.get(study):
        for seed in recipe["seeds"]:
            yield Group(study, f"{study}/{seed}", seed, {"variant": "default"})


def run_adapted(work: Folders) -> list[dict[str, Any]]:
    """Adapt runs of the main comparison to every held-out task and probe them."""
    settings = {"role": "held_out", "protocols": ("linear",)}
    rows = evaluation_rows(evaluate_adapted(work, work.recipe["adapted"]["backbones"], settings))
    return [row for row in rows if row["protocol"] == "linear"]


def evaluate_adapted(work: Folders, names: Collection[str], settings: dict[str, Any]) -> Path:
    """Evaluate adapted backbones by these names. All studies share a folder: each is adapted once."""
    adapted = work.recipe["adapted"]
    of = {name: adapted["backbones"][name] for name in names}
    backbones = {name: f"{work.main / run}@{how}" for name, (run, how) in of.items()}
    options = {
        "adapt_steps": adapted["steps"],
        "adapt_data": work.pool("all"),
        "adapt_clusters": work.main / "clusters",
        "finetune_draws": work.finetuning["finetune_draws"],
        **settings,
    }
    folder = work.out / "adapted" / str(work.group.seed) / "evaluation"
    return work.evaluate(folder, backbones, done="", **options)


def run_finetuning(work: Folders) -> list[dict[str, Any]]:
    """Fine-tune runs of the main comparison, and adapted ones, on the held-out tasks."""
    names = work.recipe["finetuning"]
    adapted = [name for name in names if name in work.recipe["adapted"]["backbones"]]
    dense = {name: str(work.main / name) for name in names if name not in adapted}
    rows = evaluation_rows(work.evaluate(work.base / "evaluation", dense, **work.finetuning))
    if adapted:
        rows += evaluation_rows(evaluate_adapted(work, adapted, work.finetuning))
    return [row for row in rows if row["protocol"] == "finetune"]


def run_baselines(work: Folders) -> list[dict[str, Any]]:
    """Train and probe further methods, on the MAE and the clusters of the main comparison."""
    runs = train_methods(work, work.recipe["baselines"], work.base)
    references = {name: str(folder) for name, folder in runs.items()}
    rows = evaluation_rows(work.evaluate(work.base / "evaluation", references))
    for name, run in runs.items():
        rows += measure_run(run, name, work.out / "data", work.main / "clusters")
    return rows


def ablation_groups(recipe: dict[str, Any]) -> Iterator[Group]:
    """One factor changed at a time, each value for every seed of the ablations."""
    for seed in recipe.get("ablation", {"seeds": []})["seeds"]:
        for change in recipe["ablation"]["changes"]:
            variant = ",".join(f"{name}={value}" for name, value in change.items())
            options = {"variant": variant, "change": change}
            yield Group("ablation", f"ablation/{seed}/{variant}", seed, options)


def run_ablation(work: Folders) -> list[dict[str, Any]]:
    """On the MAE, and unless they are what is changed the clusters, of the main comparison."""
    change, base = dict(work.group.options["change"]), work.base
    mae, clusters = work.pretrain(work.main / "mae"), work.main / "clusters"
    work.cluster(clusters, mae)
    of_clusters = {name: change.pop(name) for name in OF_CLUSTERS if name in change}
    if of_clusters:
        clusters = work.cluster(base / "clusters", mae, **of_clusters)
    settings = {**work.recipe["methods"]["moce"], **change}
    run = work.train(base / "moce", mae, clusters=clusters, **settings)
    folder = work.evaluate(base / "evaluation", {"moce": str(run)}, role="development")
    return evaluation_rows(folder) + measure_run(run, "moce", work.out / "data", clusters)


GROUPS: dict[str, Callable[[dict[str, Any]], Iterator[Group]]] = {
    "map": map_groups,
    "main": main_groups,
    "adapted": partial(groups_per_seed, "adapted"),
    "finetuning": partial(groups_per_seed, "finetuning"),
    "baselines": partial(groups_per_seed, "baselines"),
    "ablation": ablation_groups,
}
RUNS = {
    "map": run_map,
    "main": run_main,
    "adapted": run_adapted,
    "finetuning": run_finetuning,
    "baselines": run_baselines,
    "ablation": run_ablation,
}


def run_group(recipe: dict[str, Any], out: Path, group: Group) -> list[dict[str, Any]]:
    """The rows of one group, each marked with its study, variant and seed."""
    rows = RUNS[group.study](Folders(recipe, out, group))
    mark = {"study": group.study, "variant": group.options["variant"], "seed": group.seed}
    return [{**mark, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=HERE / "cpu.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/mix32"))
    parser.add_argument("--results", type=Path, help="default: results/ beside this script")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the recipe")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    given = parser.parse_args()
    recipe = yaml.safe_load(given.recipe.read_text())
    results = given.results or HERE / "results" / f"{given.recipe.stem}.jsonl"
    done = {(row["study"], row["variant"], row["seed"]) for row in read_rows(results)}
    for study in sorted(given.studies, key=STUDIES.index):  # others stand on the main comparison
        todo = [
            group
            for group in GROUPS[study](recipe)
            if (study, group.options["variant"], group.seed) not in done
            and (given.seeds is None or group.seed in given.seeds)
        ]
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(run_group, recipe, given.out, group): group for group in todo}
            for future in as_completed(running):
                merge(results, future.result())
                print(f"done: {running[future].name}", flush=True)


if __name__ == "__main__":
    main()
