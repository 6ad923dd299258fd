"""An exponential moving average of a network's weights (Polyak averaging), by torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Follows a network: average <- decay * average + (1 - decay) * weights, after every step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._averaged: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> nn.Module:
        """The network with averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Count a step; the first is copied."""
        self._averaged.update_parameters(model)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self._averaged.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's state."""
        self._averaged.load_state_dict(state)
