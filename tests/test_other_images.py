"""MoCEs trained with clusters of other images, or of another encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from builders import CLUSTERS, PRETRAIN, RUNTIME, TINY_ARGS, TRAIN

import moce
from moce.commands import evaluate
from moce.data.load import load_images
from moce.evaluation.routes import candidate_routes
from moce.evaluation.task import Task, load_task
from moce.inference.assign import assign
from moce.runs.model import read_metrics
from moce.weights.from_runs import load_clusters

LARGER = (32, 32)


@pytest.fixture(scope="module")
def other(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoCE trained on one source of images, with the clusters of all."""
    out = tmp_path_factory.mktemp("other") / "moce"
    mnist = runs.data / "mnist"
    settings = {**TRAIN, "gate_init": "random", "gate_init_std": 3.0}
    moce.train(mnist, mae=runs.mae, clusters=runs.clusters, out=out, steps=3, **settings)
    return out


def test_the_mixture_counts_the_images_it_was_trained_on(other: Path, runs) -> None:
    bank, clusters = moce.load(other), load_clusters(runs.clusters)
    images = load_images(str(runs.data / "mnist"), (16, 16))
    found = assign(images, clusters, torch.device("cpu"), "float32")
    expected = found.bincount(minlength=CLUSTERS)
    assert bank.model.cluster_sizes.tolist() == expected.tolist()
    assert 0 in expected.tolist()
    assert bank.clusters.sizes.tolist() == clusters.sizes.tolist()
    row = read_metrics(other)[-1]["gates"]
    assert all(sum(gate["images_per_expert"]) == len(images) for gate in row.values())


def test_routes_without_training_images_can_still_be_chosen(other: Path) -> None:
    bank = moce.load(other)
    unused = [route for route, images in bank.routes.items() if images == 0]
    assert unused and not set(unused) & set(candidate_routes(bank))
    for route in unused:
        encoder = bank.backbone(bank.route_choice(route))
        assert all(value.isfinite().all() for value in encoder.state_dict().values())


@pytest.fixture(scope="module")
def larger(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clusters of an encoder whose input is twice as large as the MoCE's."""
    folder = tmp_path_factory.mktemp("larger")
    arguments = {**TINY_ARGS, "img_size": LARGER[0]}
    settings = {**PRETRAIN, "model_args": arguments, "steps": 2}
    moce.pretrain(runs.data, out=folder / "mae", **settings)
    few = runs.data / "fashion_mnist"
    given = {"mae": folder / "mae", "num_clusters": CLUSTERS}
    moce.cluster(few, out=folder / "clusters", **given, **RUNTIME)
    return folder


def test_unseen_images_are_assigned_at_the_size_of_the_clusters_encoder(
    larger: Path, runs, tmp_path: Path
) -> None:
    clusters = larger / "clusters"
    moce.train(runs.data, mae=runs.mae, clusters=clusters, out=tmp_path / "moce", steps=2, **TRAIN)
    bank = moce.load(tmp_path / "moce")
    images = load_images(str(runs.data), LARGER)
    found = assign(images, load_clusters(clusters), torch.device("cpu"), "float32")
    assert bank.model.cluster_sizes.tolist() == found.bincount(minlength=CLUSTERS).tolist()
    assert bank.input_shape == bank.task_shape == (3, *LARGER)


def test_a_customized_backbone_says_how_its_images_are_made(runs) -> None:
    bank = moce.load(runs.moce)
    config = timm.data.resolve_model_data_config(bank.customize(str(runs.task)))
    assert config["input_size"] == (3, 16, 16)
    assert config["mean"] == bank.encoder_spec.mean and config["std"] == bank.encoder_spec.std
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 1.0)


def test_an_evaluation_loads_images_large_enough_for_the_backbone(
    larger: Path, runs, tmp_path: Path, monkeypatch
) -> None:
    """Clusters of a smaller encoder than the backbone: images are not enlarged for it."""
    mixture = tmp_path / "moce"
    given = {"mae": larger / "mae", "clusters": runs.clusters, "out": mixture, "steps": 2}
    moce.train(runs.data, **given, **TRAIN)
    bank = moce.load(mixture)
    assert (bank.input_shape, bank.task_shape) == ((3, 16, 16), (3, *LARGER))
    suite = tmp_path / "suite.yaml"
    task = {"name": "digits", "data": str(runs.task)}
    suite.write_text(str({"name": "s", "tasks": [task], "probe": {"solver": "lbfgs"}}))
    settings = {**RUNTIME, "out": tmp_path / "run", "protocols": ["knn"], "draws": 1}
    backbones, sizes = [f"moce={mixture}@generalist"], []

    def spied(data: str, shape: tuple[int, int, int], *rest: object) -> Task:
        sizes.append(shape)
        return load_task(data, shape, *rest)

    monkeypatch.setattr(evaluate, "load_task", spied)
    rows = moce.evaluate(suite, backbones=backbones, **settings).rows
    exported = tmp_path / "exported"
    moce.export(mixture, strategy="generalist", out=exported)
    single = moce.probe(exported, runs.task, out=tmp_path / "probe", kind="knn", **RUNTIME)
    assert sizes == [(3, *LARGER)]
    assert rows[0]["values"] == pytest.approx(single.values)
