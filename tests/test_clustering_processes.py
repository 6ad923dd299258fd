"""Balanced k-means over several processes finds what one process finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from builders import planted_features
from safetensors.torch import load_file, save_file
from torch import Tensor

from moce.clustering import balanced_kmeans as balanced
from moce.clustering.balanced_kmeans import Clustering, balanced_kmeans
from moce.clustering.feature_store import FeatureFile
from moce.clustering.features import Rows, without_duplicates
from moce.clustering.seeding import reseed_empty
from moce.runtime.distributed import shard_range

WORLD = 2
CASES = [("plain", False), ("plain", True), ("copies", False), ("few", False)]


def case(name: str) -> tuple[Tensor, int]:
    """Features, and how many clusters to find: 301 images do not divide by two."""
    if name == "copies":
        points, _ = planted_features(5, 30, 16, 0.1)
        return points.repeat(3, 1)[:301], 5
    if name == "few":  # fewer modes than clusters: some are empty at first
        return planted_features(3, 101, 16, 0.01)[0][:301], 24
    return planted_features(10, 31, 16, 0.2)[0][:301], 10


def cluster(features: Tensor, num_clusters: int, *, sampled: bool) -> Clustering:
    balanced.SAMPLE = 16 if sampled else 128
    return balanced_kmeans(features, num_clusters, chunk_size=64, sharded=True)


def _work(rank: int, folder: str) -> None:
    """Every case, by one start of the processes: that takes longer than all of them."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    for name, sampled in CASES:
        _find(Path(folder) / f"{name}-{sampled}", rank, name, sampled)
    dist.destroy_process_group()


def _find(folder: Path, rank: int, name: str, sampled: bool) -> None:
    features, num_clusters = case(name)
    own = shard_range(len(features))
    file = FeatureFile(folder, own.stop - own.start, features.shape[1])
    file.fill(features[own].split(50), lambda: False)
    mean = file.center()
    found = cluster(file.tensor(), num_clusters, sampled=sampled)
    rows = without_duplicates(Rows(features[own], sharded=True))
    moved = reseed(rows, features)
    tensors = {
        name: getattr(found, name) for name in ("centroids", "potentials", "assignment", "sizes")
    }
    save_file({**tensors, "mean": mean, "moved": moved}, folder / f"{rank}.safetensors")


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    # Forked processes need not import torch and moce again.
    torch.multiprocessing.start_processes(_work, (str(folder),), nprocs=WORLD, start_method="fork")
    return folder


def reseed(rows: Rows, features: Tensor) -> Tensor:
    """Centroids after two of five clusters, which no image is in, have been moved."""
    cluster = torch.arange(rows.count) % 3
    sizes = cluster.bincount(minlength=5)
    return reseed_empty(rows, features[:5].clone(), cluster[rows.shard], sizes)


@pytest.mark.parametrize(("name", "sampled"), CASES)
def test_two_processes_find_what_one_finds(
    found_by_two: Path, tmp_path: Path, name: str, sampled: bool
) -> None:
    folder = found_by_two / f"{name}-{sampled}"
    one, other = (load_file(folder / f"{rank}.safetensors") for rank in range(WORLD))
    for part in ("centroids", "potentials", "sizes", "mean", "moved"):
        assert torch.equal(one[part], other[part]), part
    features, num_clusters = case(name)
    file = FeatureFile(tmp_path, len(features), features.shape[1])
    file.fill(features.split(50), lambda: False)
    assert torch.allclose(file.center(), one["mean"])
    kept = balanced.SAMPLE
    try:
        alone = cluster(file.tensor(), num_clusters, sampled=sampled)
    finally:
        balanced.SAMPLE = kept
    assignment = torch.cat([one["assignment"], other["assignment"]])
    assert torch.equal(assignment.bincount(minlength=num_clusters), one["sizes"])
    assert one["sizes"].min() >= 1
    if name != "few":  # there near-ties decide, and sums are rounded otherwise
        assert torch.equal(assignment, alone.assignment)
        assert torch.allclose(one["centroids"], alone.centroids, atol=1e-5)
    rows = without_duplicates(Rows(features))
    assert torch.equal(one["moved"], reseed(rows, features))
