"""Suites, candidates, the best route measured fairly, resumed evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from builders import HEADROOM, RUNTIME, copy_run, customize
from conftest import Runs

import moce
from moce.commands import evaluate as evaluate_command
from moce.customization.selection import route_name
from moce.errors import Interrupted, MoceError
from moce.evaluation.backbones import Candidate, read_candidates
from moce.evaluation.evaluator import choose_by_probe
from moce.evaluation.routes import best_values, random_routes
from moce.evaluation.suite import pick_tasks, read_suite
from moce.evaluation.task import draw_labels, load_task
from moce.reporting.results_table import Results, results_table

FINETUNE = {"epochs": 1, "batch_size": 8, "rand_augment": "", "mixup": 0, "cutmix": 0}
SUITES = Path(__file__).parents[1] / "recipes" / "suites"


def write_suite(folder: Path, **changes: object) -> Path:
    tasks = [
        {"name": "digits", "data": "task", "role": "development"},
        {"name": "clothes", "data": "demo:clothes", "labels": 20, "metric": "mean_per_class"},
    ]
    content = {
        "name": "small",
        "draws": 2,
        "labels": 12,
        "probe": {"solver": "lbfgs"},
        "finetune": FINETUNE,
        "tasks": tasks,
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def evaluate(runs: Runs, suite: Path, out: Path, *backbones: str, **settings: object):
    return moce.evaluate(
        suite, backbones=backbones, root=runs.task.parent, out=out, **RUNTIME, **settings
    )


# --- suites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mix32", "paper11"])
def test_the_suites_that_come_along_are_read(name: str) -> None:
    suite = read_suite(SUITES / f"{name}.yaml", Path("data"))
    assert suite.name == name
    assert len(suite.tasks) >= 10
    moce.config.ProbeSettings(backbone="b", data="d", **suite.probe)
    moce.config.FinetuneSettings(backbone="b", data="d", out=Path("o"), **suite.finetune)


def test_mix32_keeps_development_and_held_out_tasks_apart() -> None:
    suite = read_suite(SUITES / "mix32.yaml", Path("data"))
    development, held_out = (pick_tasks(suite, (), r) for r in ("development", "held_out"))
    assert len(development) == 9
    assert len(held_out) == 12


def test_paper11_has_the_papers_tasks_and_metrics() -> None:
    tasks = {t.name: t.metric for t in read_suite(SUITES / "paper11.yaml", Path()).tasks}
    assert len(tasks) == 11
    per_class = {name for name, metric in tasks.items() if metric == "mean_per_class"}
    assert per_class == {"aircraft", "caltech101", "flowers", "pets"}
    assert tasks["voc2007"] == "map11"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": []}, "unknown setting 'taks' .did you mean 'tasks'"),
        ({"tasks": []}, "tasks"),
        ({"draws": 0}, "draws"),
        ({"tasks": [{"name": "a", "data": "x"}] * 2}, "two tasks named a"),
        ({"tasks": [{"name": "../a", "data": "x"}]}, "name"),
        ({"tasks": [{"name": "..", "data": "x"}]}, "name"),
        ({"tasks": [{"name": "a", "data": "x", "metric": "auc"}]}, "metric"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_line(tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(MoceError, match=message) as caught:
        read_suite(write_suite(tmp_path, **changes), Path())
    assert "\n" not in str(caught.value)


def test_paths_start_from_the_root_and_names_stay(tmp_path: Path) -> None:
    tasks = read_suite(write_suite(tmp_path), Path("root")).tasks
    assert [task.data for task in tasks] == [str(Path("root/task")), "demo:clothes"]


def test_an_unknown_task_names_the_valid_ones(tmp_path: Path) -> None:
    suite = read_suite(write_suite(tmp_path), Path())
    with pytest.raises(MoceError, match="digits, clothes"):
        pick_tasks(suite, ("cars",), None)


# --- candidates -----------------------------------------------------------------------------------


def test_candidates_are_read() -> None:
    found = read_candidates(("a=runs/a", "b=runs/b@oracle"))  # its former name
    assert found == [Candidate("a", "runs/a"), Candidate("b", "runs/b", "best_route")]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("runs/a",), "NAME=PATH"),
        (("=x",), "NAME=PATH"),
        (("a=x@best",), "@best"),
        (("a=x", "a=y"), "same name"),
        (("a/b=x",), "NAME=PATH"),
        (("..=x",), "NAME=PATH"),
        (("a|b=x",), "NAME=PATH"),
    ],
)
def test_wrong_candidates_are_refused(texts, message: str) -> None:
    with pytest.raises(MoceError, match=message):
        read_candidates(texts)


def test_a_dense_backbone_has_no_experts_to_choose_from(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="leave out @SELECTION"):
        evaluate(runs, write_suite(tmp_path), tmp_path / "out", f"a={runs.mae}@route")
    assert not (tmp_path / "out").exists()


# --- the best route -----------------------------------------------------------------------------------


def as_scores(correct: np.ndarray) -> list[list[np.ndarray]]:
    """[routes][draws] scores [m, 2] that are right (class 1) where `correct` [routes, draws, m] is."""
    return [[np.stack([1 - of, of], axis=1).astype(float) for of in route] for route in correct]


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def test_best_route_finds_a_route_that_is_better_everywhere() -> None:
    correct = np.random.default_rng(0).random((4, 3, 2000)) < 0.5
    correct[2] = np.random.default_rng(1).random((3, 2000)) < 0.7
    values = best_values(as_scores(correct), accuracy, np.ones(2000, int), 0)
    np.testing.assert_allclose(values, correct[2].mean(axis=1), atol=1e-9)


def test_best_route_does_not_win_by_luck() -> None:
    """Routes that are all alike: the best on the images it is scored on would look better."""
    correct = np.random.default_rng(0).random((8, 50, 100)) < 0.5
    fair = np.mean(best_values(as_scores(correct), accuracy, np.ones(100, int), 0))
    assert abs(fair - 0.5) < 0.02
    assert correct.mean(axis=2).max(axis=0).mean() > 0.55


def test_regret_is_what_the_best_strategy_gains(runs: Runs, tmp_path: Path) -> None:
    strategies = ("route", "merge", "generalist", "best_strategy")
    names = [f"{name}={runs.moce}@{name}" for name in strategies]
    rows = evaluate(runs, write_suite(tmp_path), tmp_path / "out", *names, tasks=("digits",)).rows
    by_name = {row["backbone"]: row for row in rows}
    means = {name: np.mean(by_name[name]["values"]) for name in strategies}
    found = by_name["best_strategy"]["choice"]["strategies"]
    assert found == pytest.approx({name: means[name] for name in strategies[:3]})
    regret = Results(rows).regret("digits", "linear")
    assert regret == pytest.approx(means["best_strategy"] - means["route"])


def test_random_routes_are_drawn_anew_for_every_draw(runs: Runs) -> None:
    bank = moce.load(runs.moce)
    routes = random_routes(bank, 40, 0, "digits")
    assert set(routes) <= set(bank.routes)
    assert len(set(routes)) > 1
    assert routes == random_routes(bank, 40, 0, "digits")
    assert routes != random_routes(bank, 40, 0, "letters")


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    names = [f"moce_{s}={runs.moce}@{s}" for s in ("route", "random", "best_route", "probe")]
    protocols = ("linear", "knn", "finetune")
    backbones = (f"mae={runs.mae}", f"moce={runs.moce}", f"dense={runs.backbone}", *names)
    evaluate(runs, write_suite(root), root / "out", *backbones, protocols=protocols)
    return root / "out"


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_every_task_backbone_and_protocol_has_a_row(evaluated: Path) -> None:
    rows = rows_of(evaluated)
    assert len(rows) == 2 * (2 * 7 + 4)  # random, best_route and probe are not fine-tuned
    assert {row["protocol"] for row in rows} == {"linear", "knn", "finetune"}
    assert all(0 <= value <= 1 for row in rows for value in row["values"])
    probes = [row for row in rows if row["protocol"] != "finetune"]
    assert all(len(row["values"]) == 2 for row in probes)
    by_task = {row["task"]: (row["labels"], row["metric"], row["role"]) for row in rows}
    assert by_task == {
        "digits": (12, "accuracy", "development"),
        "clothes": (20, "mean_per_class", "held_out"),
    }


def test_confusion_counts_every_test_image_in_every_draw(runs: Runs, evaluated: Path) -> None:
    count = len(load_task(str(runs.task), (3, 16, 16)).test)
    row = next(r for r in rows_of(evaluated) if (r["task"], r["backbone"]) == ("digits", "mae"))
    assert np.sum(row["confusion"]) == 2 * count


def test_a_moce_run_says_what_each_task_got(evaluated: Path) -> None:
    rows = {(row["backbone"], row["task"]): row for row in rows_of(evaluated)}
    assert rows["moce_route", "digits"]["choice"]["strategy"] == "route"
    assert len(rows["moce_best_route", "digits"]["choice"]["routes"]) > 1
    assert len(rows["moce_probe", "digits"]["choice"]["chosen"]) == 2


def test_the_same_values_as_the_single_commands_give(runs: Runs, evaluated: Path) -> None:
    rows = {(r["backbone"], r["task"], r["protocol"]): r["values"] for r in rows_of(evaluated)}
    options = {"num_labels": 12, "draws": 2, **RUNTIME}
    alone = moce.probe(runs.mae, runs.task, solver="lbfgs", **options)
    assert rows["mae", "digits", "linear"] == pytest.approx(alone.values, abs=1e-6)
    near = moce.probe(runs.mae, runs.task, kind="knn", **options)
    assert rows["mae", "digits", "knn"] == pytest.approx(near.values, abs=1e-6)


def test_what_an_evaluation_leaves(evaluated: Path) -> None:
    names = {path.name for path in evaluated.iterdir()}
    assert names == {
        "config.yaml", "evaluation.json", "rows.jsonl", "results.md", "finetune", "backbones"
    }  # fmt: skip
    table = (evaluated / "results.md").read_text()
    assert "|digits|12|accuracy|" in table.replace(" ", "")
    vit = timm.create_model(f"local-dir:{evaluated}/backbones/moce/digits", pretrained=True)
    assert vit(torch.zeros(1, 3, 16, 16)).shape == (1, 32)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = write_suite(tmp_path), tmp_path / "out"
    backbones = (f"mae={runs.mae}", f"moce={runs.moce}")
    whole = evaluate(runs, suite, tmp_path / "whole", *backbones).rows
    add, made = evaluate_command._Evaluation._add, []

    def stop_after_two(evaluation, row) -> None:
        add(evaluation, row)
        made.append(row["task"])
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_command._Evaluation, "_add", stop_after_two)
    with pytest.raises(Interrupted, match=r"after 2 rows, .* --resume"):
        evaluate(runs, suite, out, *backbones)
    assert len(rows_of(out)) == 2
    monkeypatch.setattr(evaluate_command._Evaluation, "_add", add)
    again = evaluate(runs, suite, out, *backbones, resume=True).rows
    plain = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert plain(again) == plain(whole)


def test_rows_of_version_0_1_0_are_resumed(runs: Runs, tmp_path: Path) -> None:
    """They name the selection `how`; its suites had no dense tasks."""
    suite, out = write_suite(tmp_path), tmp_path / "out"
    first = evaluate(runs, suite, out, f"moce={runs.moce}@route").rows
    renamed = {"selection": "how"}
    old = [{renamed.get(name, name): value for name, value in row.items()} for row in first]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    about = json.loads((out / "evaluation.json").read_text())
    about["suite"] = {k: v for k, v in about["suite"].items() if k not in ("detect", "segment")}
    about["suite"]["tasks"] = [
        {k: v for k, v in task.items() if k != "task"} for task in about["suite"]["tasks"]
    ]
    (out / "evaluation.json").write_text(json.dumps(about))
    again = evaluate(runs, suite, out, f"moce={runs.moce}@route", resume=True).rows
    assert again == first  # seconds too: none was probed again


def test_a_finished_evaluation_is_not_overwritten_unasked(runs: Runs, evaluated: Path) -> None:
    suite = write_suite(evaluated.parent)
    with pytest.raises(MoceError, match="not empty"):
        evaluate(runs, suite, evaluated, f"mae={runs.mae}")


def test_the_table_averages_only_what_is_complete() -> None:
    row = {"labels": 9, "metric": "accuracy", "protocol": "linear", "values": [0.5, 0.7]}
    rows = [
        {**row, "task": "a", "backbone": "x"},
        {**row, "task": "b", "backbone": "x"},
        {**row, "task": "b", "backbone": "y"},
    ]
    table = [line.replace(" ", "") for line in results_table(rows).splitlines()]
    assert table[-1] == "|**mean**|||**60.0**||"
    assert "60.0±10.0" in table[2]


# --- choosing by labels ---------------------------------------------------------------------------


def test_labels_choose_the_candidate_that_separates_them(runs: Runs) -> None:
    """One expert is kept, the others are ruined: the labels must find the good one."""
    bank, task = moce.load(runs.moce), load_task(str(runs.task), (3, 16, 16))
    for layer in bank.model.experts:
        for number, expert in enumerate(layer.experts):
            if number != 1:
                for parameter in expert.parameters():  # so that all images look the same
                    parameter.data.normal_(0, 1e9 if parameter.ndim == 1 else 1e-9)
    assert any(1 in route for route in bank.routes)
    chosen = choose_by_probe(bank, task.train, task.train_labels, len(task.classes))
    assert chosen.strategy == "route"
    assert 1 in chosen.route
    assert chosen.share == pytest.approx(chosen.votes[chosen.route] / sum(chosen.votes.values()))
    routes = {f"route {route_name(route)}" for route in bank.routes}
    assert chosen.scores.keys() == {*routes, "merge", "generalist"}
    assert chosen.scores[f"route {route_name(chosen.route)}"] == max(chosen.scores.values())


def test_customize_by_probe_writes_a_backbone(runs: Runs, tmp_path: Path) -> None:
    made = customize(runs.moce, runs.task, out=tmp_path / "b", strategy="probe")
    assert timm.create_model(f"local-dir:{tmp_path}/b", pretrained=True) is not None
    card = json.loads((tmp_path / "b" / "selection.json").read_text())
    assert card["strategy"] in ("route", "merge", "generalist")
    printed = made.summary()
    for name, value in card["scores"].items():
        assert f"{name} {100 * value:.1f} %" in printed


def test_choosing_by_labels_needs_two_images_of_a_class(runs: Runs) -> None:
    bank, task = moce.load(runs.moce), load_task(str(runs.task), (3, 16, 16))
    one_each = [int(np.flatnonzero(task.train_labels == n)[0]) for n in range(3)]
    with pytest.raises(MoceError, match="two labeled images"):
        choose_by_probe(bank, task.train.subset(one_each), np.arange(3), 3)


# --- inputs and overwriting -----------------------------------------------------------------------


def test_overwriting_spares_the_inputs(runs: Runs, tmp_path: Path) -> None:
    backbone = tmp_path / "b"
    customize(runs.moce, runs.task, out=backbone)
    suite = write_suite(tmp_path)
    with pytest.raises(MoceError, match="holds the input"):
        evaluate(runs, suite, backbone, f"a={backbone}", overwrite=True)
    assert (backbone / "model.safetensors").is_file()


def test_an_evaluation_and_a_headroom_run_can_be_overwritten(
    runs: Runs, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moce.commands.headroom.SMALLEST_GROUP", 8)
    out = copy_run(evaluated, tmp_path / "out")
    evaluate(runs, write_suite(tmp_path), out, f"a={runs.mae}", tasks=("digits",), overwrite=True)
    assert len(rows_of(out)) == 1
    (out / "finetune" / "notes").mkdir(parents=True)
    (out / "finetune" / "notes" / "mine.txt").write_text("x")
    with pytest.raises(MoceError, match="files that moce did not write"):
        evaluate(runs, write_suite(tmp_path), out, f"a={runs.mae}", overwrite=True)
    for _ in range(2):
        moce.headroom(
            runs.data,
            mae=runs.mae,
            clusters=runs.clusters,
            out=tmp_path / "h",
            overwrite=True,
            **HEADROOM,
        )


def test_a_changed_suite_is_noticed_and_more_can_be_asked_for(runs: Runs, tmp_path: Path) -> None:
    out, suite = tmp_path / "out", write_suite(tmp_path)
    evaluate(runs, suite, out, f"a={runs.mae}", tasks=("digits",))
    more = (f"a={runs.mae}", f"b={runs.backbone}")
    rows = evaluate(runs, suite, out, *more, tasks=("digits",), resume=True).rows
    assert [row["backbone"] for row in rows] == ["a", "b"]
    backbone = copy_run(runs.backbone, tmp_path / "backbone")
    other = {"tasks": ("digits",), "resume": True}
    evaluate(runs, suite, out, f"c={backbone}", **other)
    shutil.copy(runs.mae / "model.safetensors", backbone / "other.safetensors")
    evaluate(runs, suite, out, *more, **other)
    with pytest.raises(MoceError, match="backbone was weights"):
        evaluate(runs, suite, out, f"c={backbone}", **other)
    write_suite(tmp_path, labels=9)
    with pytest.raises(MoceError, match="has changed"):
        evaluate(runs, suite, out, *more, tasks=("digits",), resume=True)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("probe", {"solvr": "sgd"}, "probe: unknown setting 'solvr'"),
        ("probe", {"draws": 5}, "must not set draws"),
        ("finetune", {"epochs": -1}, "finetune: setting 'epochs'"),
        ("finetune", {"base_lr": 1e-3, "lr_grid": [1e-3]}, "base_lr and lr_grid"),
    ],
)
def test_wrong_sections_are_found_at_once(tmp_path: Path, section, values, message: str) -> None:
    with pytest.raises(MoceError, match=message):
        read_suite(write_suite(tmp_path, **{section: values}), Path())


def test_best_route_needs_enough_images() -> None:
    with pytest.raises(MoceError, match="4 test images"):
        best_values([[np.ones((3, 2))]], accuracy, np.ones(3, int), 0)


def test_draws_of_labels_are_distinct_between_seeds() -> None:
    labels = np.arange(200) % 4
    drawn = {tuple(draw_labels(labels, 20, seed, n)) for seed in range(4) for n in range(4)}
    assert len(drawn) == 16


def test_a_rate_that_overflows_loses_and_a_grid_can_be_resumed(runs: Runs, tmp_path: Path) -> None:
    options = {**RUNTIME, **FINETUNE, "lr_grid": (2e-3, 1e9)}
    found = moce.finetune(runs.backbone, runs.task, out=tmp_path / "t", **options)
    tried = rows_of(tmp_path / "t")[0]["lr_grid"]
    assert tried[1] == {"base_lr": 1e9, "score": 0.0}
    again = moce.finetune(runs.backbone, runs.task, out=tmp_path / "t", resume=True, **options)
    assert again.value == found.value


def test_tasks_without_images_are_found_before_any_is_run(runs: Runs, tmp_path: Path) -> None:
    tasks = [{"name": "good", "data": "task"}, {"name": "gone", "data": "nowhere"}]
    with pytest.raises(MoceError, match=r"gone: no images at .*nowhere"):
        evaluate(runs, write_suite(tmp_path, tasks=tasks), tmp_path / "out", f"a={runs.mae}")
    assert not (tmp_path / "out").exists()
