"""From features to a map: two coordinates per image.

t-SNE (scikit-learn's, which moce has already; UMAP would bring numba and LLVM) of at most LANDMARKS
images, so that the time is bounded. Every other image is put among its nearest landmarks, and so are
images that are dropped later. PCA, in seconds for any number of images,
shows the directions of largest variance only, in which most clusters overlap.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moce.data.rng import Stream, keyed_generator

Method = Literal["tsne", "pca"]
LANDMARKS = 4000
WIDTH = 50  # principal components that t-SNE is given
PERPLEXITY = 30
NEIGHBORS = 3
FEWEST = 8  # images, below which there is nothing for t-SNE to arrange
FEWEST_FOR_PCA = 3
BLOCK = 4096  # features compared at a time


def project(features: Tensor, method: Method = "tsne", seed: int = 0) -> Tensor:
    """Coordinates [m, 2] float32 in 0..1, the longer side from 0 to 1, of unit features [m, D]."""
    if len(features) < FEWEST_FOR_PCA:
        return torch.eye(2)[: len(features)]
    if method == "pca" or len(features) < FEWEST:
        return _scaled(_pca(features.float(), 2))
    generator = keyed_generator(seed, Stream.ORDER, 1)
    chosen = torch.randperm(len(features), generator=generator)[:LANDMARKS].sort().values
    places = _scaled(_tsne(features[chosen].float(), seed))
    if len(chosen) == len(features):
        return places
    found = torch.empty(len(features), 2)
    for start in range(0, len(features), BLOCK):
        block = slice(start, start + BLOCK)
        found[block] = place(features[block], features[chosen], places)
    found[chosen] = places
    return found


def place(features: Tensor, known: Tensor, places: Tensor) -> Tensor:
    """Coordinates [b, 2] of unit features [b, D], by their nearest of `known` [m, D] at `places` [m, 2].

    Weights fall off with the distance, so that an image that is known is put where it is.
    """
    similarity, rows = nearest(features, known, NEIGHBORS)
    weights = 1 / (1 - similarity).clamp(min=1e-4).square()
    weights /= weights.sum(dim=1, keepdim=True)
    return (places[rows] * weights[:, :, None]).sum(dim=1)


def nearest(features: Tensor, known: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity and rows, [b, count] each, most similar first, of unit features [b, D].

    known: [m, D] of unit norm, in float16 or float32; count: at most m.
    """
    best, rows = torch.empty(len(features), 0), torch.empty(len(features), 0, dtype=torch.int64)
    for start in range(0, len(known), BLOCK):
        block = known[start : start + BLOCK].float()
        similarity, places = (features.float() @ block.T).topk(min(count, len(block)), dim=1)
        best, rows = torch.cat([best, similarity], 1), torch.cat([rows, places + start], 1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best, rows


def _pca(features: Tensor, width: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    width = min(width, *features.shape)
    found = PCA(width, svd_solver="covariance_eigh").fit_transform(features.numpy())
    return np.pad(found, ((0, 0), (0, max(0, 2 - width))))


def _tsne(features: Tensor, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    model = TSNE(
        perplexity=perplexity, init="pca", random_state=seed % 2**32, n_jobs=os.cpu_count()
    )
    return model.fit_transform(_pca(features, WIDTH))


def _scaled(places: np.ndarray) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(places, np.float32))
    found = found - found.min(dim=0).values
    return found / found.max().clamp(min=1e-12)
