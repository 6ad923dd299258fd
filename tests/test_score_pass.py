"""A pass over all features gives the right sums for all sizes of chunks and blocks."""

from __future__ import annotations

import pytest
import torch
from builders import unit_rows
from torch import Tensor
from torch.nn.functional import one_hot
from torch.testing import assert_close

from moce.clustering import score_pass as score_pass_module
from moce.clustering import sinkhorn
from moce.clustering.features import Rows
from moce.clustering.score_pass import Sums, score_pass
from moce.clustering.sinkhorn import Scores
from moce.models.cluster_model import scores

COUNT, WIDTH, CLUSTERS, EPSILON = 1000, 8, 12, 0.05
CHUNKS = [1000, 300, 256, 192, 100, 7]
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def small(monkeypatch) -> None:
    """Masses of every fourth row, scores in blocks of 64."""
    monkeypatch.setattr(sinkhorn, "MASS_ROWS", COUNT // 4)
    monkeypatch.setattr(score_pass_module, "BLOCK", 64)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    potentials = torch.randn(CLUSTERS, generator=torch.Generator().manual_seed(2))
    return unit_rows(COUNT, WIDTH), unit_rows(CLUSTERS, WIDTH, seed=1), potentials


def run_pass(chunk: int, weights: Tensor | None = None, **options: bool) -> tuple[Sums, Tensor]:
    features, centroids, potentials = inputs()
    rows = Rows(features, weights, chunk_size=chunk)
    assignment = torch.zeros(COUNT, dtype=torch.int32)
    scores = Scores(rows, centroids, EPSILON, cache=False)
    return score_pass(scores, potentials, assignment, **options), assignment


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("copies", [False, True])
def test_sums_of_the_clusters_are_those_of_all_rows(
    chunk: int, exact: bool, copies: bool, small
) -> None:
    features, centroids, potentials = inputs()
    weights = (torch.arange(COUNT) % 3 > 0).float()
    sums, assignment = run_pass(chunk, weights if copies else None, exact=exact)
    counted = weights if copies else torch.ones(COUNT)
    cluster = scores(features, centroids, potentials, EPSILON).argmax(dim=1)
    assert torch.equal(assignment.long(), cluster)
    member = (one_hot(cluster, CLUSTERS) * counted[:, None]).double()
    assert_close(sums.sizes, member.sum(dim=0))
    assert_close(sums.features, member.T @ features.double(), atol=1e-4, rtol=1e-5)
    own = (features * centroids[cluster]).sum(dim=1)
    assert sums.similarity == pytest.approx((own @ counted / counted.sum()).item(), rel=1e-5)
    moved = ((cluster != 0).float() @ counted / counted.sum()).item()
    assert sums.moved == pytest.approx(moved)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("exact", [True, False])
def test_masses_are_those_of_all_rows_or_of_a_part(chunk: int, exact: bool, small) -> None:
    features, centroids, potentials = inputs()
    soft = scores(features, centroids, potentials, EPSILON).double().softmax(dim=1)
    sums, _ = run_pass(chunk, exact=exact)
    if exact:
        taken = torch.ones(COUNT, dtype=torch.bool)
    else:
        starts = torch.arange(COUNT) % chunk % 64  # a block ends with its chunk
        taken = starts % 4 == 0
        assert COUNT // 4 <= taken.sum() < COUNT / 2
    masses = soft[taken].sum(dim=0)
    assert_close(sums.masses.columns, masses, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_soft_sums_are_weighted_by_the_assignment(chunk: int, small) -> None:
    features, centroids, potentials = inputs()
    soft = scores(features, centroids, potentials, EPSILON).softmax(dim=1)
    sums, _ = run_pass(chunk, soft=True, exact=False)
    assert_close(sums.features, (soft.T @ features).double(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_cached_scores_are_not_read_before_all_are_there(chunk: int) -> None:
    """A thread that is done does not mark the scores of the others as cached."""
    features, centroids, potentials = inputs()
    cached = Scores(Rows(features, chunk_size=chunk), centroids, EPSILON, cache=True)
    assert cached._cache is not None
    cached._cache.fill_(torch.nan)
    expected, assignment = run_pass(chunk)
    for _ in range(3):
        found = torch.zeros(COUNT, dtype=torch.int32)
        sums = score_pass(cached, potentials, found)
        assert torch.equal(found, assignment)
        assert_close(sums.masses.columns, expected.masses.columns)


def test_no_rows_give_no_sums() -> None:
    """A process may have none."""
    _, centroids, potentials = inputs()
    empty = Scores(Rows(torch.zeros(0, WIDTH)), centroids, EPSILON, cache=False)
    sums = score_pass(empty, potentials, torch.zeros(0, dtype=torch.int32))
    assert sums.sizes.sum() == 0 and sums.features.abs().sum() == 0
