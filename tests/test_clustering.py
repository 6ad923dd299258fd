"""Balanced clusters: the assignment is the optimum, and no cluster is empty, double or oversized."""

from __future__ import annotations

import json

import pytest
import torch
from builders import RUNTIME, planted_features, tiny_encoder, tiny_mae, unit_rows
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn.functional import normalize

import moce
from moce.clustering import balanced_kmeans as balanced
from moce.clustering.balanced_kmeans import balanced_kmeans
from moce.clustering.feature_store import mean_of
from moce.clustering.features import Rows
from moce.clustering.sinkhorn import Scores, balanced_potentials
from moce.data.load import load_images
from moce.inference.features import extract_features
from moce.models.cluster_model import ClusterModel, assign, scores, unit
from moce.runs import assignments as assignments_module
from moce.runs.assignments import Assignments, read_assignments
from moce.weights.from_runs import load_clusters


def q_of(features: Tensor, centroids: Tensor, potentials: Tensor, epsilon: float) -> Tensor:
    return scores(features, centroids, potentials, epsilon).softmax(dim=1) / len(features)


def balance(
    features: Tensor,
    centroids: Tensor,
    epsilon: float,
    tolerance: float = 1e-2,
    max_steps: int = 1000,
    chunk_size: int = 4096,
) -> Tensor:
    """Balanced potentials, [K], from zeros."""
    scores = Scores(Rows(features, chunk_size=chunk_size), centroids, epsilon)
    zeros = features.new_zeros(len(centroids))
    return balanced_potentials(scores, zeros, tolerance, max_steps)[0]


def model_of(found, epsilon: float = 0.005) -> ClusterModel:
    width = found.centroids.shape[1]
    return ClusterModel(
        found.centroids, found.potentials, torch.zeros(width), found.sizes, epsilon, "mean", 0.9,
        tiny_encoder(), tiny_mae().encoder,
    )  # fmt: skip


def distinct(centroids: Tensor) -> bool:
    similarity = centroids.double() @ centroids.double().T
    similarity.fill_diagonal_(-1)
    return bool(similarity.max() < 1 - 1e-6)


# --- Sinkhorn-Knopp -----------------------------------------------------------------------------


def reference_assignment(similarity: Tensor, epsilon: float) -> Tensor:
    """Textbook Sinkhorn-Knopp: scale rows and columns of exp(S / epsilon) in turn, in float64."""
    q = ((similarity - similarity.max()) / epsilon).exp()
    count, num_clusters = q.shape
    for _ in range(20000):
        q = q / q.sum(dim=0, keepdim=True) / num_clusters
        q = q / q.sum(dim=1, keepdim=True) / count
    return q


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_balance_is_sinkhorn_knopp(epsilon: float) -> None:
    features, centroids = unit_rows(60, 8).double(), unit_rows(5, 8, seed=1).double()
    potentials = balance(features, centroids, epsilon, tolerance=1e-9, max_steps=20000)
    q = q_of(features, centroids, potentials, epsilon)
    assert (q.sum(dim=0) * 5 - 1).abs().max() < 1e-6
    assert (q.sum(dim=1) * 60 - 1).abs().max() < 1e-6
    expected = reference_assignment(features @ centroids.T, epsilon)
    assert torch.allclose(q, expected, rtol=1e-6, atol=1e-12)


def test_balanced_assignment_beats_other_balanced_ones() -> None:
    """It maximizes Tr(Q^T S) + epsilon H(Q): moving mass around any 2 x 2 square makes it worse."""
    features, centroids = unit_rows(40, 8).double(), unit_rows(4, 8, seed=1).double()
    similarity, epsilon = features @ centroids.T, 0.1
    potentials = balance(features, centroids, epsilon, tolerance=1e-10, max_steps=20000)
    best = q_of(features, centroids, potentials, epsilon)

    def objective(q: Tensor) -> Tensor:
        return (q * similarity).sum() - epsilon * (q * q.log()).sum()

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        i, j = torch.randperm(40, generator=generator)[:2]
        a, b = torch.randperm(4, generator=generator)[:2]
        amount = 0.5 * torch.stack([best[i, a], best[j, b]]).min()
        other = best.clone()
        other[i, a] -= amount
        other[j, b] -= amount
        other[i, b] += amount
        other[j, a] += amount
        assert objective(other) < objective(best)


@pytest.mark.parametrize("copies", [0, 40])
def test_a_clustering_reports_how_far_from_balanced_it_is(copies: int, monkeypatch) -> None:
    features, _ = planted_features(12, 30, 16, 0.5)
    features = torch.cat([features, features[:1].repeat(copies, 1)])  # which count once
    assert balanced_kmeans(features, 12, tolerance=1e-2).marginal_error <= 1e-2
    monkeypatch.setattr(balanced, "FINAL_BALANCE_STEPS", 1)
    assert balanced_kmeans(features, 12, tolerance=1e-9).marginal_error > 1e-9


def test_balance_stops_within_its_tolerance() -> None:
    features, _ = planted_features(6, 100, 16, 0.1)
    centroids = unit_rows(12, 16, seed=3)
    potentials = balance(features, centroids, 0.02, tolerance=1e-2, max_steps=5000)
    columns = q_of(features, centroids, potentials, 0.02).sum(dim=0) * 12
    assert (columns - 1).abs().max() <= 1.01e-2


def test_extreme_similarities_over_epsilon_stay_finite() -> None:
    features, _ = planted_features(3, 50, 16, 0.01)
    potentials = balance(features, unit_rows(8, 16, seed=5), 1e-3, max_steps=200)
    assert torch.isfinite(potentials).all()


def test_chunks_change_assignments_at_near_ties_only() -> None:
    features, _ = planted_features(8, 60, 16, 0.2)
    centroids, epsilon = unit_rows(16, 16, seed=2), 0.02
    whole, parts = (
        balance(features, centroids, epsilon, tolerance=1e-4, chunk_size=size)
        for size in (10**6, 7)
    )
    one, other = (
        assign(features, centroids, potentials, epsilon, size)
        for potentials, size in ((whole, 10**6), (parts, 7))
    )
    top = scores(features, centroids, whole, epsilon).topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-2
    assert clear.float().mean() > 0.9
    assert torch.equal(one[clear], other[clear])


# --- balanced k-means -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_clusters_are_found(seed: int) -> None:
    features, mode = planted_features(10, 60, 24, 0.08, seed)
    found = balanced_kmeans(features, 10, seed=seed)
    assert adjusted_rand_score(mode.numpy(), found.assignment.numpy()) > 0.95
    assert found.sizes.tolist() == found.assignment.bincount(minlength=10).tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_modes_than_clusters_leave_none_empty_or_double(seed: int) -> None:
    features, _ = planted_features(8, 250, 32, 0.02, seed)
    found = balanced_kmeans(features, 64, seed=seed)
    assert found.sizes.min() >= 1
    assert distinct(found.centroids)
    # Measured: smallest 4 to 14, largest 47 to 79; 31.25 on average.
    assert found.sizes.max() < 3 * 31.25
    assert (found.sizes >= 31.25 / 3).float().mean() > 0.8


def test_many_exact_duplicates_leave_no_cluster_empty_or_double() -> None:
    points = unit_rows(30, 16)
    copies = torch.randint(0, 30, (900,), generator=torch.Generator().manual_seed(0))
    features = torch.cat([points, points[copies]])
    found = balanced_kmeans(features, 12)
    assert found.sizes.min() >= 1
    assert distinct(found.centroids)


@pytest.mark.parametrize(("others", "copies", "num_clusters"), [(40, 1000, 16), (500, 500, 64)])
def test_one_image_copied_many_times_does_not_take_all_clusters(
    others: int, copies: int, num_clusters: int
) -> None:
    features = torch.cat([unit_rows(1, 16).repeat(copies, 1), unit_rows(others, 16, seed=1)])
    found = balanced_kmeans(features, num_clusters)
    assert found.sizes.min() >= 1
    assert distinct(found.centroids)
    assert torch.equal(model_of(found).assign(features)[0], found.assignment)


def test_as_many_clusters_as_distinct_images() -> None:
    features = unit_rows(12, 16).repeat(4, 1)
    found = balanced_kmeans(features, 12)
    assert found.sizes.tolist() == [4] * 12


def test_hard_sizes_are_balanced() -> None:
    """Uneven modes: 400, 200, 100, 50 and 50 images."""
    parts = [planted_features(5, 400, 24, 0.3)[0].reshape(5, 400, 24)[n, :count]
             for n, count in enumerate((400, 200, 100, 50, 50))]  # fmt: skip
    found = balanced_kmeans(torch.cat(parts), 20)
    # Measured: 32 to 50 of 40 on average; plain k-means gives 12 to 76.
    assert found.sizes.max() / found.sizes.min() < 2


def test_soft_update_with_a_large_epsilon_is_the_worse_choice() -> None:
    features, _ = planted_features(8, 250, 32, 0.05)
    hard = balanced_kmeans(features, 32)
    soft = balanced_kmeans(features, 32, epsilon=0.05, update="soft")
    assert soft.sizes.min() >= 1
    near = lambda c: ((c @ c.T).fill_diagonal_(-1) > 0.9999).any(dim=1).sum().item()  # noqa: E731
    assert near(hard.centroids) <= near(soft.centroids)


def test_clustering_is_repeatable_and_depends_on_the_seed() -> None:
    features, _ = planted_features(6, 50, 16, 0.5)
    one, again, other = (balanced_kmeans(features, 12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.assignment, again.assignment)
    assert not torch.equal(one.centroids, other.centroids)


def test_fewer_distinct_images_than_clusters_is_refused() -> None:
    with pytest.raises(moce.MoceError, match="distinct"):
        balanced_kmeans(unit_rows(7, 16).repeat(5, 1), 8)
    with pytest.raises(moce.MoceError, match="8"):
        balanced_kmeans(unit_rows(7, 16), 8)


def test_distinct_images_are_counted_over_all_images_not_a_sample() -> None:
    """Twenty distinct images among very many copies of one are enough for eight clusters."""
    rare = unit_rows(20, 8, seed=1)
    features = torch.cat([unit_rows(1, 8).expand(60000, 8), rare])
    found = balanced_kmeans(features, 8, max_iterations=3)
    assert found.sizes.min() >= 1


def test_features_that_are_not_finite_are_refused() -> None:
    features = unit_rows(20, 8)
    features[3, 2] = float("nan")
    with pytest.raises(moce.MoceError, match="finite"):
        balanced_kmeans(features, 4)


# --- the cluster model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "num_clusters", "spread", "update"),
    [(8, 64, 0.02, "hard"), (10, 10, 0.1, "hard"), (6, 24, 0.5, "hard"), (8, 24, 0.1, "soft")],
)
def test_model_gives_training_features_their_own_cluster(
    modes: int, num_clusters: int, spread: float, update: str
) -> None:
    features, _ = planted_features(modes, 100, 24, spread)
    found = balanced_kmeans(features, num_clusters, update=update)
    cluster, similarity = model_of(found).assign(features)
    assert torch.equal(cluster, found.assignment)
    expected = (features * found.centroids[cluster]).sum(dim=1)
    assert torch.allclose(similarity, expected)


def test_nearest_rule_is_the_closest_centroid() -> None:
    features, _ = planted_features(6, 100, 24, 0.5)
    model = model_of(balanced_kmeans(features, 24))
    nearest, similarity = model.assign(features, "nearest")
    assert torch.equal(nearest, (features @ model.centroids.T).argmax(dim=1))
    balanced, own = model.assign(features)
    assert 0 < (nearest != balanced).float().mean() < 0.5
    assert (similarity >= own - 1e-6).all()
    with pytest.raises(moce.MoceError, match="rule"):
        model.assign(features, "furthest")


def test_model_survives_tensors_and_info() -> None:
    features, _ = planted_features(6, 50, 32, 0.3)
    model = model_of(balanced_kmeans(features, 12))
    info = json.loads(json.dumps(model.info()))
    again = ClusterModel.from_tensors(model.tensors(), info)
    assert torch.equal(again.assign(features)[0], model.assign(features)[0])
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.encoder(images), model.encoder(images))
    assert (again.epsilon, again.pooling, again.spec) == (0.005, "mean", model.spec)
    assert again.tensors().keys() == model.tensors().keys()


def test_features_are_centered_and_of_unit_norm() -> None:
    raw = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 3 + 5
    mean = mean_of(raw)
    assert torch.allclose(mean, raw.mean(dim=0))
    expected = normalize(raw - raw.mean(dim=0), dim=1)
    assert torch.allclose(unit(raw, mean), expected, atol=1e-6)


def test_run_holds_what_was_clustered(runs, tmp_path) -> None:
    model, known = load_clusters(runs.clusters), read_assignments(runs.clusters).to_dict()
    images = load_images(str(runs.data), (16, 16))
    raw = extract_features(model.encoder, model.spec, images, device=torch.device("cpu"))
    cluster, similarity = model.assign(model.normalize(raw))
    assert [known[name] for name in images.ids] == cluster.tolist()
    assert model.sizes.tolist() == cluster.bincount(minlength=model.num_clusters).tolist()
    assert similarity.mean().item() == pytest.approx(model.similarity, abs=1e-5)


@pytest.mark.parametrize("settings", [{"pooling": "cls"}, {"update": "soft", "epsilon": 0.05}])
def test_other_settings_cluster_too(runs, tmp_path, settings: dict) -> None:
    options = {"mae": runs.mae, "out": tmp_path / "run", "num_clusters": 6, **RUNTIME}
    result = moce.cluster(runs.data, **options, **settings)
    assert min(result.sizes) >= 1 and sum(result.sizes) == 160


def test_images_find_their_clusters_in_any_order(monkeypatch) -> None:
    """Also if some are new, or gone, or come in more than one part."""
    monkeypatch.setattr(assignments_module, "AT_ONCE", 3)
    names = [f"{row}.png" for row in range(10)]
    known = Assignments.of(names[:6], torch.arange(6)).joined(
        Assignments.of(names[6:], torch.arange(6, 10))
    )
    assert len(known) == 10 and known.to_dict() == {name: row for row, name in enumerate(names)}
    for rows in (range(10), range(9, -1, -1), (0, 1, 2, 4, 5, 6, 7, 9), (5, 5, 5, 5), ()):
        assert known.find(names[row] for row in rows).tolist() == list(rows)
    assert known.find(["9.png", "new", "0.png", "1.png", "other"]).tolist() == [9, -1, 0, 1, -1]
    assert Assignments.of().find(["a", "b"]).tolist() == [-1, -1]
