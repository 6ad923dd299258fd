"""The passes of a clustering give the right sums, for all sizes of chunks, with or without a cache."""

from __future__ import annotations

import pytest
import torch
from builders import unit_rows
from torch import Tensor
from torch.nn.functional import one_hot
from torch.testing import assert_close

from moce.clustering import sinkhorn
from moce.clustering.features import Rows, without_duplicates
from moce.clustering.sinkhorn import Assigned, Scores
from moce.models.cluster_model import scores

COUNT, WIDTH, CLUSTERS, EPSILON = 1000, 8, 12, 0.05
CHUNKS = [1000, 300, 192, 7]
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(params=[0, 10**9], ids=["no_cache", "cache"])
def cache(request, monkeypatch) -> int:
    monkeypatch.setattr(sinkhorn, "CACHE_BYTES", request.param)
    return request.param


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    potentials = torch.randn(CLUSTERS, generator=torch.Generator().manual_seed(2))
    return unit_rows(COUNT, WIDTH), unit_rows(CLUSTERS, WIDTH, seed=1), potentials


def scores_of(chunk: int, index: Tensor | None = None) -> Scores:
    features, centroids, _ = inputs()
    return Scores(Rows(features, index, chunk_size=chunk), centroids, EPSILON)


def check_assigned(found: Assigned, index: Tensor) -> None:
    features, centroids, potentials = inputs()
    features = features[index]
    cluster = scores(features, centroids, potentials, EPSILON).argmax(dim=1)
    assert torch.equal(found.cluster, cluster)
    member = one_hot(cluster, CLUSTERS).double()
    assert torch.equal(found.sizes, one_hot(cluster, CLUSTERS).sum(dim=0))
    assert_close(found.features, member.T @ features.double(), atol=1e-4, rtol=1e-5)
    own = (features * centroids[cluster]).sum(dim=1)
    assert found.similarity == pytest.approx(own.mean().item(), rel=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sums_of_the_clusters_are_those_of_all_rows(chunk: int, cache: int) -> None:
    potentials = inputs()[2]
    some = (torch.arange(COUNT) % 3 > 0).nonzero()[:, 0]
    for index in (None, some):
        one = scores_of(chunk, index)
        for _ in range(2):  # the second pass reads the cache
            found = one.assign(potentials)
            check_assigned(found, torch.arange(COUNT) if index is None else index)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_masses_and_their_derivative_are_exact(chunk: int, cache: int) -> None:
    features, centroids, potentials = inputs()
    q = scores(features, centroids, potentials, EPSILON).double().softmax(dim=1)
    one = scores_of(chunk)
    for derive in (True, False, True):
        found = one.masses(potentials, derive=derive)
        assert_close(found.columns, q.sum(dim=0), atol=1e-4, rtol=1e-5)
        if derive:
            expected = torch.diag(q.sum(dim=0)) - q.T @ q
            assert_close(found.derivative, expected, atol=1e-3, rtol=1e-4)
        else:
            assert found.derivative is None


def test_the_derivative_of_a_part_of_the_rows_is_scaled_to_all(monkeypatch) -> None:
    monkeypatch.setattr(sinkhorn, "GRAM_ROWS", COUNT // 4)
    features, centroids, potentials = inputs()
    q = scores(features, centroids, potentials, EPSILON).double().softmax(dim=1)
    found = scores_of(1000).masses(potentials, derive=True)
    some = q[::4]
    expected = (torch.diag(some.sum(dim=0)) - some.T @ some) * (COUNT / len(some))
    assert_close(found.columns, q.sum(dim=0), atol=1e-4, rtol=1e-5)
    assert_close(found.derivative, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_soft_sums_are_weighted_by_the_assignment(chunk: int, cache: int) -> None:
    features, centroids, potentials = inputs()
    soft = scores(features, centroids, potentials, EPSILON).softmax(dim=1)
    found = scores_of(chunk).assign(potentials, soft=True)
    assert_close(found.features, (soft.T @ features).double(), atol=1e-4, rtol=1e-5)


def test_duplicates_are_left_out() -> None:
    features = inputs()[0]
    rows = without_duplicates(Rows(features[torch.tensor([3, 0, 3, 1, 0, 2])]))
    assert rows.index is not None and rows.index.tolist() == [0, 1, 3, 5]
    assert without_duplicates(Rows(features)).index is None


def test_no_rows_give_no_sums() -> None:
    """A process may have none."""
    _, centroids, potentials = inputs()
    empty = Scores(Rows(torch.zeros(0, WIDTH)), centroids, EPSILON)
    found = empty.assign(potentials)
    assert found.sizes.sum() == 0 and found.features.abs().sum() == 0
