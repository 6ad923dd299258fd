"""RankMe against spectra whose effective rank is known."""

from __future__ import annotations

import math

import pytest
import torch

from moce.inference.rankme import rankme


def with_spectrum(values: list[float], count: int = 12) -> torch.Tensor:
    """Features [count, len(values)] with these singular values, in random directions."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
        for n in (count, len(values))
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0),  # even: as many as there are dimensions
        ([5.0, 0.0, 0.0, 0.0], 1.0),  # collapsed to one direction
        ([2.0, 2.0, 0.0, 0.0], 2.0),
        ([3.0, 1.0], 4 / 3**0.75),  # exp of the entropy of 3/4 and 1/4
        ([4.0, 2.0, 1.0, 1.0], math.exp(1.75 * math.log(2))),
    ],
)
def test_rank_of_a_known_spectrum(values: list[float], rank: float) -> None:
    assert rankme(with_spectrum(values)) == pytest.approx(rank, rel=1e-6)


def test_scale_order_and_copies_do_not_matter() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    expected = rankme(features)
    assert 1 < expected < 6
    assert rankme(features.flip(0) * 7) == pytest.approx(expected)
    assert rankme(torch.cat([features, features])) == pytest.approx(expected)


@pytest.mark.parametrize("features", [torch.zeros(4, 3), torch.full((4, 3), math.nan)])
def test_features_without_a_rank_are_an_error(features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no rank"):
        rankme(features)
