"""RankMe: the effective rank of features, a measure of what an encoder has learned without labels.

Source: Garrido et al., arXiv 2210.02885, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features: Tensor) -> float:
    """exp of the entropy of the normalized singular values of features [n, d], 1 .. min(n, d).

    With singular values s and p_k = s_k / sum(s): exp(-sum_k p_k log p_k). The features are not
    centered, as in the paper, which adds 1e-7 to each p_k where here 0 log 0 is 0. Computed in
    float64. Raises ValueError if all features are 0 or one is not finite.
    """
    if not features.isfinite().all() or not features.any():
        raise ValueError("the features have no rank: they are all 0, or not finite")
    values = torch.linalg.svdvals(features.double().cpu())
    return torch.special.entr(values / values.sum()).sum().exp().item()
