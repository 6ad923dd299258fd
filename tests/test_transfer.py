"""Probes and fine-tuning: the published recipes, repeatable augmentation, the choice of a rate."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from builders import QUICK_TUNING as QUICK
from builders import RUNTIME, demo_images, tiny_encoder
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from timm.optim import Lars
from torch import nn

import moce
from moce.commands import finetune as finetune_command
from moce.commands import probe as probe_command
from moce.config import FinetuneSettings, ProbeSettings
from moce.config.load import parse, read_recipe
from moce.data.loader import Batch
from moce.errors import MoceError
from moce.evaluation.finetune import Inputs, by_size, hold_out, tuning_views
from moce.evaluation.probe import choose_pooling
from moce.evaluation.results import read_rows
from moce.evaluation.sgd_probe import build_head, build_optimizer, steps_of
from moce.evaluation.sklearn_probe import (
    STRENGTHS,
    cross_validated,
    knn_scores,
    linear_scores,
)
from moce.evaluation.task import load_task

RECIPES = Path(__file__).parents[1] / "recipes"


def settings_of(**values: object) -> FinetuneSettings:
    return FinetuneSettings(backbone="b", data="d", out=Path("o"), **values)


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "width", "epochs", "base_lr", "layer_decay", "drop_path", "warmup"),
    [
        (12, 192, 100, 5e-4, 0.65, 0.1, 0.05),
        (12, 768, 100, 5e-4, 0.65, 0.1, 0.05),
        (24, 384, 100, 5e-4, 0.65, 0.1, 0.05),  # deep, but narrow: not that large
        (24, 1024, 50, 1e-3, 0.75, 0.2, 0.1),
        (32, 1280, 50, 1e-3, 0.75, 0.3, 0.1),
    ],
)
def test_fine_tuning_takes_what_is_published_for_the_size(
    depth, width, epochs, base_lr, layer_decay, drop_path, warmup
) -> None:
    vit = SimpleNamespace(blocks=[None] * depth, embed_dim=width)
    found = by_size(settings_of(), vit)
    assert (found.epochs, found.base_lr, found.layer_decay, found.drop_path, found.warmup) == (
        epochs, base_lr, layer_decay, drop_path, warmup
    )  # fmt: skip
    assert found.warmup * found.epochs == 5
    given = by_size(settings_of(epochs=3, drop_path=0.0), vit)
    assert (given.epochs, given.drop_path, given.base_lr) == (3, 0.0, base_lr)


def test_the_other_published_values_are_the_defaults() -> None:
    tuned, probe = settings_of(), ProbeSettings(backbone="b", data="d")
    assert (tuned.batch_size, tuned.weight_decay, tuned.beta2, tuned.min_lr) == (
        1024, 0.05, 0.999, 1e-6
    )  # fmt: skip
    assert (tuned.mixup, tuned.cutmix, tuned.smoothing, tuned.random_erasing) == (0.8, 1, 0.1, 0.25)
    assert tuned.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (probe.solver, probe.epochs, probe.batch_size, probe.base_lr) == ("sgd", 90, 16384, 0.1)
    assert probe.warmup * probe.epochs == pytest.approx(10, abs=0.01)
    assert steps_of(probe, 1_281_167) == (7038, 16384)
    assert steps_of(probe, 150) == (90, 150)


def test_the_chosen_values_are_in_the_config(runs, tmp_path: Path, monkeypatch) -> None:
    large = ((2, 8, {"layer_decay": 0.8, "drop_path": 0.3}),)
    monkeypatch.setattr("moce.evaluation.finetune.LARGER_SIZES", large)
    moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", drop_path=0.2, **QUICK)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["layer_decay"], config["drop_path"]) == (0.8, 0.2)
    monkeypatch.undo()  # a resumed run keeps what it began with, whatever the rule says now
    moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["finetune_small", "probe_small"])
def test_presets_are_valid_and_open_with_their_command(name: str) -> None:
    kind = FinetuneSettings if name.startswith("finetune") else ProbeSettings
    path = RECIPES / f"{name}.yaml"
    parse(kind, {**read_recipe(path), "backbone": "b", "data": "d", "out": "o"})
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = f"moce {name.removesuffix('_small')}"
    assert any(command in line and f"--config recipes/{path.name}" in line for line in comments)


# --- augmentation ---------------------------------------------------------------------------------


def views(rows: list[int], epoch: int = 0, **values: object) -> torch.Tensor:
    settings = settings_of(random_erasing=values.pop("random_erasing", 0.0), **values)
    index = torch.tensor(rows)
    batch = Batch(index, torch.full_like(index, epoch), demo_images().pixels[index])
    spec = tiny_encoder()
    return Inputs(settings, spec, tuning_views(settings, spec, (16, 16)))(batch)


def test_rand_augment_depends_on_seed_image_and_epoch_only() -> None:
    whole = views(list(range(12)))
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - what timm draws from
    assert torch.equal(views(list(range(12))), whole)
    assert torch.equal(views([7, 3]), whole[[7, 3]])
    assert not torch.equal(views(list(range(12)), epoch=1), whole)
    assert not torch.equal(views(list(range(12)), seed=1), whole)
    assert not torch.equal(views(list(range(12)), rand_augment=""), whole)


def test_rand_augment_at_its_strongest_works_on_every_image() -> None:
    """timm's posterize asks Pillow for no bits at all then, which is an error."""
    strongest = views(list(range(60)), rand_augment="rand-m10-n6-p1-inc1")
    assert strongest.isfinite().all()


def test_rand_augment_leaves_the_generators_of_others_alone() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    views([0, 1], random_erasing=1.0)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_erasing_fills_a_rectangle_of_as_many_images_as_asked_for() -> None:
    rows = list(range(60))
    plain = views(rows, rand_augment="")
    changed = (views(rows, rand_augment="", random_erasing=0.25) != plain).flatten(1).any(dim=1)
    assert 5 <= changed.sum() <= 27
    erased = views(rows, rand_augment="", random_erasing=1.0)
    share = (erased != plain).any(dim=1).float().mean(dim=(1, 2))
    assert 0.02 < share.mean() < 1 / 3


def test_erasing_draws_the_same_in_the_same_step() -> None:
    torch.manual_seed(1)
    first = views([0, 1, 2], random_erasing=1.0)
    torch.manual_seed(1)
    assert torch.equal(views([0, 1, 2], random_erasing=1.0), first)


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-z9", "rand-mfoo9"])
def test_a_policy_timm_cannot_read_is_refused_before_anything_is_written(
    policy: str, runs, tmp_path: Path
) -> None:
    with pytest.raises(MoceError, match="policy"):
        moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", rand_augment=policy, **QUICK)
    assert not (tmp_path / "run").exists()


# --- the published linear probe -------------------------------------------------------------------


def test_probe_head_is_a_norm_without_weights_and_a_layer() -> None:
    norm, layer = build_head(6, 3, seed=0)
    assert isinstance(norm, nn.BatchNorm1d) and not norm.affine and norm.eps == 1e-6
    assert [p.shape for p in build_head(6, 3, seed=0).parameters()] == [(3, 6), (3,)]
    assert torch.equal(build_head(6, 3, seed=0)[1].weight, layer.weight)
    assert not torch.equal(build_head(6, 3, seed=1)[1].weight, layer.weight)


def test_lars_moves_weights_by_a_share_of_their_norm() -> None:
    head = build_head(6, 3, seed=0)
    optimizer = build_optimizer(head)
    assert isinstance(optimizer, Lars)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0)
        group["lr"] = 2.0
    before = head[1].weight.detach().clone()
    head[1].weight.grad = torch.full_like(before, 7.0)
    head[1].bias.grad = torch.full((3,), 7.0)
    optimizer.step()
    moved = (head[1].weight.detach() - before).norm()
    assert moved.item() == pytest.approx(2.0 * 0.001 * before.norm().item(), rel=1e-4)
    assert head[1].bias.tolist() == pytest.approx([-14.0] * 3)


def test_sgd_probe_reads_what_there_is_to_read(runs) -> None:
    """Ten kinds of scanned digits, from an encoder that has hardly learnt anything."""
    recipe = {**read_recipe(RECIPES / "probe_small.yaml"), "hflip": False}
    result = moce.probe(runs.mae, "demo:optdigits", num_labels=200, **recipe, **RUNTIME)
    assert result.mean > 0.4
    assert (result.protocol, result.solver, result.metric) == ("linear", "sgd", "accuracy")
    counts = np.array(result.confusion)
    assert counts.trace() / counts.sum() == pytest.approx(result.mean)


def test_sgd_probe_leaves_the_encoder_and_repeats_itself(runs) -> None:
    recipe = {"epochs": 3, "batch_size": 8, "draws": 2, "num_labels": 9, "base_lr": 50, **RUNTIME}
    first = moce.probe(runs.backbone, runs.task, **recipe)
    assert moce.probe(runs.backbone, runs.task, **recipe, micro_batch_size=3) == first


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, "cls"), ({"solver": "lbfgs"}, "mean"), ({"kind": "knn"}, "mean"), ({"pooling": "mean"}, "mean")],
)  # fmt: skip
def test_pooling_is_the_solvers(values: dict, expected: str) -> None:
    settings = ProbeSettings(backbone="b", data="d", **values)
    with_class, without = (
        SimpleNamespace(vit=SimpleNamespace(cls_token=token, fc_norm=torch.nn.Identity()))
        for token in (torch.zeros(1), None)
    )
    assert choose_pooling(settings, with_class) == expected
    assert choose_pooling(settings, without) == "mean"


# --- scores ---------------------------------------------------------------------------------------


def clouds(classes: list[int], per_class: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Features around a direction per class, and the classes."""
    labels = np.repeat(classes, per_class)
    noise = np.random.default_rng(0).normal(size=(len(labels), 8))
    return 4 * np.eye(8)[labels] + noise, labels


@pytest.mark.parametrize("neighbors", [1, 7])
def test_votes_of_neighbors_are_those_of_rows_of_0_and_1(neighbors: int) -> None:
    """Which scikit-learn would count; here they are never made. To the last bit, copies too."""
    numbers = np.random.default_rng(0)
    train = numbers.normal(size=(90, 8)).astype(np.float32)
    train[50:55] = train[0]
    labels = numbers.choice([0, 1, 3], 90)
    test = np.concatenate([numbers.normal(size=(30, 8)).astype(np.float32), train[:4]])
    mean = KNeighborsRegressor(neighbors, weights="distance")
    expected = mean.fit(normalize(train), np.eye(5)[labels]).predict(normalize(test))
    ours = knn_scores(train, labels, test, 5, neighbors)
    assert np.array_equal(ours, expected.astype(np.float32))


def four_clouds() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping classes, so that strengths differ: features, labels, features of a test set."""
    numbers = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], 15)
    features = (np.eye(8)[labels] + numbers.normal(size=(60, 8))).astype(np.float32)
    return features, labels, numbers.normal(size=(9, 8)).astype(np.float32)


REGRESSION = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))


def test_the_linear_probe_is_a_grid_search_of_scikit_learn(threads: int) -> None:
    """To the bit, on any number of threads."""
    features, labels, test = four_clouds()
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    search = GridSearchCV(REGRESSION, {"logisticregression__C": STRENGTHS}, cv=folds)
    expected = search.fit(features, labels).decision_function(test)
    assert np.array_equal(linear_scores(features, labels, test, 4), expected.astype(np.float32))
    means = search.cv_results_["mean_test_score"]
    assert list(cross_validated(features, labels, 4).values()) == pytest.approx(list(means))
    assert len(set(means)) > 1


def test_each_of_several_labels_has_a_regression_of_scikit_learn(threads: int) -> None:
    features, labels, test = four_clouds()
    several = np.eye(4, dtype=np.float32)[labels]
    means = cross_validated(features, several, 4)
    fit = REGRESSION.set_params(logisticregression__C=max(means, key=lambda c: means[c])).fit
    expected = [fit(features, answers).decision_function(test) for answers in several.T]
    ours = linear_scores(features, several, test, 4)
    assert np.array_equal(ours, np.stack(expected, axis=1).astype(np.float32))


@pytest.mark.parametrize("scores_of", [linear_scores, knn_scores])
@pytest.mark.parametrize("classes", [[1, 4], [0, 2, 5]])
def test_classes_without_examples_score_lowest(scores_of, classes: list[int]) -> None:
    features, labels = clouds(classes)
    scores = scores_of(features, labels, features, 6)
    assert scores.shape == (len(labels), 6) and scores.dtype == np.float32
    assert (scores.argmax(axis=1) == labels).mean() > 0.9
    absent = [number for number in range(6) if number not in classes]
    assert (scores[:, absent].max(axis=1) <= scores[:, classes].min(axis=1)).all()


@pytest.mark.parametrize("scores_of", [linear_scores, knn_scores])
def test_several_labels_are_scored_class_by_class(scores_of) -> None:
    features, labels = clouds([0, 1, 2], per_class=20)
    several = np.eye(5, dtype=np.float32)[labels]
    several[:, 3] = several[:, 0] + several[:, 1]
    scores = scores_of(features, several, features, 5)
    for number in (0, 1, 2, 3):
        has = several[:, number] == 1
        assert np.median(scores[has, number]) > np.quantile(scores[~has, number], 0.9)
    assert (scores[:, 4] <= scores[:, :4].min(axis=1)).all()


# --- the choice of a rate -------------------------------------------------------------------------


def test_held_out_images_are_a_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    kept, held = hold_out(labels, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(70))
    assert np.bincount(labels[held]).tolist() == [8, 4, 2]
    assert not np.array_equal(held, hold_out(labels, 0.2, seed=1)[1])
    for count in (2, 3):
        kept, held = hold_out(np.arange(count), 0.99, seed=0)
        assert len(kept) == 1 and len(held) == count - 1
    kept, held = hold_out(np.ones((10, 3), np.float32), 0.3, seed=0)
    assert len(held) == 3


GRID = {**QUICK, "lr_grid": (1e-7, 3e-2), "epochs": 4, "rand_augment": "", "crop_scale": 0.8}


def test_rates_are_chosen_without_the_test_images(runs, tmp_path: Path, monkeypatch) -> None:
    looked_at = []
    predict = finetune_command.predict_scores

    def spy(vit, spec, images, *rest):
        looked_at.append(set(images.splits))
        return predict(vit, spec, images, *rest)

    monkeypatch.setattr(finetune_command, "predict_scores", spy)
    out = tmp_path / "run"
    moce.finetune(runs.backbone, runs.task, out=out, **GRID)
    assert looked_at == [{"train"}, {"train"}, {"test"}]
    (results,) = read_rows(out)
    assert [member["base_lr"] for member in results["lr_grid"]] == [1e-7, 3e-2]
    best = max(results["lr_grid"], key=lambda member: member["score"])["base_lr"]
    assert yaml.safe_load((out / "config.yaml").read_text())["base_lr"] == best
    assert results["labels"] == len(load_task(str(runs.task), (3, 16, 16)).train)
    assert np.array(results["confusion"]).shape == (3, 3)


def test_a_search_goes_on_where_it_stopped(runs, tmp_path: Path, monkeypatch) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    moce.finetune(runs.backbone, runs.task, out=straight, **GRID)
    trained = []
    fit = finetune_command.fit

    def spy(stage, settings, *rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(settings.base_lr)
        fit(stage, settings, *rest)

    monkeypatch.setattr(finetune_command, "fit", spy)
    with pytest.raises(KeyboardInterrupt):
        moce.finetune(runs.backbone, runs.task, out=stopped, **GRID)
    assert trained == [1e-7, 3e-2]
    trained.clear()
    moce.finetune(runs.backbone, runs.task, out=stopped, resume=True)
    assert len(trained) == 1  # the best one, on all images
    one, other = (read_rows(run) for run in (straight, stopped))
    assert one == other
    weights = [(run / "model.safetensors").read_bytes() for run in (straight, stopped)]
    assert weights[0] == weights[1]
    moce.finetune(runs.backbone, runs.task, out=stopped, overwrite=True, **QUICK)


# --- the presets, where there is something to learn -----------------------------------------------


@pytest.mark.slow
def test_presets_learn_from_few_labels_what_the_published_recipes_do_not(
    runs, tmp_path: Path
) -> None:
    values = {"num_labels": 200, "hflip": False, **RUNTIME}
    presets = {name: read_recipe(RECIPES / f"{name}_small.yaml") for name in ("probe", "finetune")}
    task = "demo:optdigits"
    published = moce.probe(runs.mae, task, **values).mean
    assert moce.probe(runs.mae, task, **values, **presets["probe"]).mean > published + 0.2
    published = moce.finetune(runs.mae, task, out=tmp_path / "published", **values).value
    preset = {**values, **presets["finetune"]}
    assert moce.finetune(runs.mae, task, out=tmp_path / "preset", **preset).value > published + 0.2


@pytest.mark.parametrize(
    ("values", "shown"), [([0.5], "accuracy 50.0 % (9 labels)"), ([0.4, 0.6], "50.0 ± 10.0 % (2 draws of 9")]
)  # fmt: skip
def test_a_single_draw_has_no_spread(values: list[float], shown: str) -> None:
    mean, std = float(np.mean(values)), float(np.std(values))
    result = probe_command.ProbeResult(
        "b", "t", "knn", None, "mean", "accuracy", 9, values, mean, std, confusion=None
    )
    assert shown in result.summary()
