"""Gates: float32 tables, the two losses, the start from groups, and where gradients come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import BLOCKS, CLUSTERS, EXPERTS, batch, tiny_mae, tiny_moce, unit_rows
from torch import Tensor, nn
from torch.testing import assert_close

from moce.clustering.grouping import group_clusters
from moce.data.dataset import ImageDataset
from moce.models.gates import (
    ClusterGate,
    balance_loss,
    gate_for,
    imbalance_loss,
    random_gate,
    squared_cv,
)
from moce.training.gate_stats import GateStats, kinds_of, purity

ONE_HOT = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])]
UNIFORM = torch.full((8, 4), 0.25)


def test_table_is_float32_and_exact_under_autocast() -> None:
    gate, clusters = ClusterGate(torch.randn(4, 32) * 3), unit_rows(64, 32)
    plain = gate.table(clusters)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gate.table(clusters.bfloat16().float())
        exact = gate.table(clusters)
    assert exact.dtype == cast.dtype == torch.float32
    assert torch.equal(exact, plain)
    reference = (clusters.double() @ gate.weight.double().T).softmax(dim=1)
    assert_close(plain.double(), reference, atol=1e-6, rtol=0)


def test_gate_losses_of_a_mixture_are_float32_under_autocast() -> None:
    mixture = tiny_moce(tiny_mae())
    images, noise, clusters = batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = mixture(images, noise, clusters, torch.zeros(2, CLUSTERS, EXPERTS))
    plain = mixture(images, noise, clusters)
    for name in ("reconstruction", "balance", "imbalance"):
        assert getattr(output, name).dtype == torch.float32
    assert torch.equal(output.balance, plain.balance)
    assert torch.equal(output.imbalance, plain.imbalance)


def test_noise_is_added_to_the_logits() -> None:
    gate, clusters = ClusterGate(torch.randn(3, 32)), unit_rows(5, 32)
    noise = torch.randn(5, 3)
    assert_close(gate.table(clusters, noise), (clusters @ gate.weight.T + noise).softmax(dim=1))


def test_squared_cv_by_hand() -> None:
    # mean 2, population variance ((1 + 0 + 1) / 3)
    assert squared_cv(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx((2 / 3) / 4)
    assert squared_cv(torch.tensor([0.0, 0.0, 0.0, 8.0])).item() == pytest.approx(3.0)


def test_losses_by_hand() -> None:
    table = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    counts = torch.tensor([3, 1])
    # importance 2.9 and 1.1: mean 2, deviation 0.9
    assert balance_loss(table, counts).item() == pytest.approx(0.45**2)
    # CV^2 of the rows: (0.4 / 0.5)^2 and (0.3 / 0.5)^2, weighted 3 to 1
    assert imbalance_loss(table, counts).item() == pytest.approx(-(3 * 0.64 + 0.36) / 4)


def test_a_cluster_of_n_images_weighs_as_n_images() -> None:
    table = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    clusters = torch.tensor([0, 0, 3, 4, 4, 4])
    counts = clusters.bincount(minlength=5)
    importance = table[clusters].sum(dim=0)
    assert_close(balance_loss(table, counts), squared_cv(importance))
    assert_close(imbalance_loss(table, counts), -squared_cv(table[clusters]).mean())


def test_losses_at_their_bounds() -> None:
    counts = torch.full((8,), 5)
    assert imbalance_loss(ONE_HOT, counts).item() == pytest.approx(-3.0)
    assert imbalance_loss(UNIFORM, counts).item() == pytest.approx(0.0, abs=1e-10)
    assert balance_loss(UNIFORM, counts).item() == pytest.approx(0.0, abs=1e-10)
    assert balance_loss(ONE_HOT, counts).item() == pytest.approx(0.0, abs=1e-10)
    collapsed = torch.eye(4)[torch.zeros(8, dtype=torch.int64)]
    assert balance_loss(collapsed, counts).item() == pytest.approx(3.0)


def test_losses_stay_within_their_bounds() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        table = (torch.randn(8, 4) * 5).softmax(dim=1)
        counts = torch.randint(0, 9, (8,))
        assert -3 - 1e-5 <= imbalance_loss(table, counts).item() <= 0
        assert 0 <= balance_loss(table, counts).item() <= 3 + 1e-5


def test_a_uniform_gate_is_stationary_for_both_losses() -> None:
    gate, clusters = ClusterGate(torch.zeros(4, 32)), unit_rows(8, 32)
    counts = torch.arange(8) + 1
    for loss in (balance_loss, imbalance_loss):
        (gradient,) = torch.autograd.grad(loss(gate.table(clusters), counts), gate.weight)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("num_clusters", "num_experts"), [(8, 2), (12, 3), (24, 4), (30, 8)])
@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.95])
def test_gate_for_reproduces_groups_at_the_wanted_confidence(
    num_clusters: int, num_experts: int, confidence: float
) -> None:
    clusters = unit_rows(num_clusters, 64, seed=num_clusters)
    groups = torch.arange(num_clusters) % num_experts
    table = ClusterGate(gate_for(clusters, groups, num_experts, confidence)).table(clusters)
    assert torch.equal(table.argmax(dim=1), groups)
    assert table.amax(dim=1).mean().item() == pytest.approx(confidence, abs=1e-3)


def test_gate_for_groups_of_more_clusters_than_dimensions() -> None:
    """The groups a run starts from, where no gate can have any logits it likes."""
    for seed in range(3):
        clusters = unit_rows(96, 32, seed=seed)
        groups = group_clusters(clusters, torch.full((96,), 50), 4)
        table = ClusterGate(gate_for(clusters, groups, 4, 0.8)).table(clusters)
        agreement = (table.argmax(dim=1) == groups).float().mean()
        assert agreement > 0.9
        assert table.amax(dim=1).mean().item() == pytest.approx(0.8, abs=1e-3)


def test_weights_are_laid_out_row_by_row() -> None:
    """Fused optimizers read weights and restored moments as flat memory, in whatever layout."""
    gate = ClusterGate(gate_for(unit_rows(8, 32), torch.arange(8) % 3, 3, 0.8))
    assert gate.weight.is_contiguous()


def related_clusters() -> tuple[Tensor, Tensor]:
    """24 clusters of four domains with 3, 5, 6 and 10 of them, [24, 16] unit, and their domain."""
    domain = torch.tensor([0] * 3 + [1] * 5 + [2] * 6 + [3] * 10)
    far = 4 * unit_rows(4, 16, seed=1)[domain]
    return nn.functional.normalize(far + unit_rows(24, 16, seed=2), dim=1), domain


@pytest.mark.parametrize("num_groups", [4, 8, 12])
def test_groups_keep_related_clusters_together(num_groups: int) -> None:
    clusters, domain = related_clusters()
    groups = group_clusters(clusters, torch.full((24,), 10), num_groups)
    assert set(groups.tolist()) == set(range(num_groups))
    for number in range(num_groups):
        assert len(domain[groups == number].unique()) == 1
    work = groups.bincount()
    assert work.tolist() == sorted(work.tolist(), reverse=True)  # numbered from the largest


@pytest.mark.parametrize(("bound", "largest"), [(1.0, 5), (1.5, 5), (2.0, 6), (100.0, 10)])
def test_a_bound_splits_large_groups_first(bound: float, largest: int) -> None:
    clusters, _ = related_clusters()
    groups = group_clusters(clusters, torch.full((24,), 10), 8, bound)
    assert groups.bincount(minlength=8).max() <= largest


def test_groups_count_images_not_clusters() -> None:
    """A domain of few clusters with most of the images is the one that is split."""
    clusters, domain = related_clusters()
    sizes = torch.where(domain == 0, 1000, 1)
    groups = group_clusters(clusters, sizes, 6, 1.0)
    assert len(groups[domain == 0].unique()) == 3


def test_groups_do_not_depend_on_the_order_of_clusters() -> None:
    clusters, _ = related_clusters()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    sizes = torch.arange(24) + 10
    groups = group_clusters(clusters, sizes, 5)
    assert torch.equal(group_clusters(clusters[order], sizes[order], 5), groups[order])


def test_a_single_cluster_is_a_single_group() -> None:
    assert group_clusters(unit_rows(1, 4), torch.tensor([7]), 1).tolist() == [0]


def test_no_balance_loss_within_the_bound() -> None:
    table = torch.eye(4)
    even, skewed = torch.tensor([10.0, 10, 10, 10]), torch.tensor([19.0, 19, 1, 1])
    for weights in (even, skewed):
        assert balance_loss(table, weights, bound=2.0) == 0
        expected = weights.var(unbiased=False) / weights.mean() ** 2
        assert balance_loss(table, weights).item() == pytest.approx(expected.item())
    overloaded = torch.tensor([36.0, 2, 1, 1])  # 3.6 even shares: 1.6 beyond the bound
    assert balance_loss(table, overloaded, 2.0).item() == pytest.approx(1.6**2 / 4)


def test_random_gate_has_the_stated_deviation() -> None:
    weight = random_gate(8, 4000, 0.02, torch.Generator().manual_seed(0))
    assert weight.shape == (8, 4000)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("gate_scale", ["straight_through", "prob"])
def test_gates_learn_from_the_reconstruction_alone(gate_scale: str) -> None:
    mixture = tiny_moce(tiny_mae(), gate_scale=gate_scale)
    mixture(*batch(16)).reconstruction.backward()
    assert all(gate.weight.grad.abs().max() > 1e-6 for gate in mixture.gates)


@pytest.mark.parametrize("loss", ["balance", "imbalance"])
def test_gates_learn_from_each_gate_loss_alone_and_nothing_else_does(loss: str) -> None:
    mixture = tiny_moce(tiny_mae(), balance_scope="batch")
    getattr(mixture(*batch(16)), loss).backward()
    assert all(gate.weight.grad.abs().max() > 1e-4 for gate in mixture.gates)
    assert all(parameter.grad is None for parameter in mixture.mae.parameters())


def test_gates_only_learn_about_clusters_that_were_seen() -> None:
    """The gradient of a row of the table is along its own cluster's embedding."""
    mixture = tiny_moce(tiny_mae())
    mixture.clusters.copy_(torch.eye(CLUSTERS, 32))
    images, noise, _ = batch(6)
    mixture(images, noise, torch.full((6,), 2)).reconstruction.backward()
    for gate in mixture.gates:
        touched = gate.weight.grad.abs().amax(dim=0) > 0
        assert touched.nonzero()[:, 0].tolist() == [2]


@pytest.mark.parametrize("gate_scale", ["straight_through", "prob"])
def test_gradient_of_the_gate_is_that_of_its_output_scale(gate_scale: str) -> None:
    """A hair more of log p scales the output by a hair more: d loss / d log p = d loss / d log g."""
    mixture = tiny_moce(tiny_mae(), gate_scale=gate_scale, different=True)
    images, noise, _ = batch(6)
    clusters = torch.full((6,), 2)
    table = mixture.tables()[0]
    mixture(images, noise, clusters).reconstruction.backward()
    p, expert = table[2].detach().max(dim=0)

    def loss_at(scale: float) -> Tensor:
        routings = mixture.route(clusters)
        first = routings[BLOCKS[0]]
        first.gate = first.gate.detach() * scale
        return mixture.mae(images, noise, routings).loss

    with torch.no_grad():
        slope = (loss_at(1.01) - loss_at(0.99)) / 0.02
    # d log p_e / d W_j = (1[j = e] - p_j) c
    share = torch.nn.functional.one_hot(expert, EXPERTS) - table[2].detach()
    expected = slope * share[:, None] * mixture.clusters[2][None]
    assert 0 < p < 1
    assert_close(mixture.gates[0].weight.grad, expected, atol=2e-5, rtol=0.05)


def test_the_losses_make_gates_confident_and_share_the_work() -> None:
    torch.manual_seed(0)
    gate, clusters = ClusterGate(torch.randn(4, 32) * 0.5), unit_rows(24, 32)
    sizes = torch.arange(24) % 5 + 5.0
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05)
    before = gate.table(clusters).amax(dim=1).mean().item()
    for _ in range(150):
        table = gate.table(clusters)
        loss = balance_loss(table, sizes) + imbalance_loss(table, sizes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    table = gate.table(clusters)
    assert before < 0.5 and table.amax(dim=1).mean().item() > 0.95
    assert balance_loss(table, sizes).item() < 0.05  # of at most 3


def test_dataset_scope_counts_all_images_and_batch_scope_those_of_the_batch() -> None:
    images, noise, clusters = batch(8)
    counts = clusters.bincount(minlength=CLUSTERS)
    for scope in ("dataset", "batch"):
        mixture = tiny_moce(tiny_mae(), balance_scope=scope)
        weights = mixture.cluster_sizes if scope == "dataset" else counts
        expected = sum(balance_loss(table, weights) for table in mixture.tables())
        assert_close(mixture(images, noise, clusters).balance, expected)
        assert len(mixture.tables()) == len(BLOCKS)


def test_purity_by_hand() -> None:
    """Three clusters, two kinds: expert 0 has 3 + 1 images of kind 0 and 1 of kind 1."""
    counts = torch.tensor([[3, 0], [1, 1], [0, 5]])
    assert purity(counts, torch.tensor([0, 0, 1])) == pytest.approx((4 + 5) / 10)
    assert purity(counts, torch.tensor([0, 2, 0])) == pytest.approx((5 + 1) / 10)


def test_kinds_are_counted_by_cluster() -> None:
    ids, labels = ["a/1", "a/2", "b/1", "b/2"], ["x", "y", "x", None]
    images = ImageDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), ids, labels, [None] * 4)
    counts = kinds_of(images, torch.tensor([0, 2, 2, 2]), 3)
    assert {kind: found.tolist() for kind, found in counts.items()} == {
        "domain": [[1, 0], [0, 0], [1, 2]]
    }
    labeled = replace(images, ids=["1", "2", "3", "4"], labels=["x", "y", "x", "z"])
    assert kinds_of(labeled, torch.tensor([0, 0, 1, 1]), 2)["class"].tolist() == [
        [1, 1, 0], [1, 0, 1]
    ]  # fmt: skip


def test_moved_clusters_are_counted_from_the_start() -> None:
    """A gate that is turned around and back: flipped twice, moved once and not at all."""
    moce = tiny_moce(tiny_mae())
    stats = GateStats(moce)
    found = []
    for _ in range(2):
        with torch.no_grad():
            for gate in moce.gates:
                gate.weight.copy_(gate.weight.roll(1, 0) if not found else gate.weight.roll(-1, 0))
        row = stats()["gates"][str(BLOCKS[0])]
        found.append((row["clusters_flipped"], row["clusters_moved"]))
    assert found == [(1.0, 1.0), (1.0, 0.0)]
