"""Diagnostics of expert layers for metrics.jsonl: gate confidence, entropy, images per expert."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moce.models.experts import divergence
from moce.models.moce import MoCE
from moce.models.token_moe import TokenMoE


class Diagnostics(Protocol):
    """Computes values that are logged beside the losses.

    state: tensors kept from one row to the next; checkpoints save and restore them.
    """

    state: dict[str, Tensor]

    def __call__(self) -> dict[str, Any]: ...


class GateStats:
    """Per MoE block of a MoCE (metrics "gates"), computed from the clean tables.

    images_per_expert: training images per expert; max_gate: mean largest probability; entropy:
    mean entropy of the gates, in nats; clusters_flipped: share of the clusters whose expert changed
    since the last row; divergence: of the experts' parameters. Means are over training images.
    """

    def __init__(self, moce: MoCE) -> None:
        self._moce = moce
        self.state = {"routes": moce.routes()}

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        moce, routes = self._moce, self._moce.routes()
        flipped = (routes != self.state["routes"].to(routes.device)).float().mean(dim=0)
        self.state["routes"] = routes
        weights = moce.cluster_sizes / moce.cluster_sizes.sum()
        rows = {}
        for index, (number, table) in enumerate(zip(moce.blocks, moce.tables(), strict=True)):
            images = torch.zeros(moce.num_experts, device=table.device)
            images = images.index_add_(0, routes[:, index], moce.cluster_sizes)
            entropy = -(table * table.clamp(min=1e-12).log()).sum(dim=1)
            rows[str(number)] = {
                "images_per_expert": images.long().tolist(),
                "max_gate": (weights * table.amax(dim=1)).sum().item(),
                "entropy": (weights * entropy).sum().item(),
                "clusters_flipped": flipped[index].item(),
                "divergence": divergence(moce.experts[index]),
            }
        return {"gates": rows}


class ExpertStats:
    """Per MoE block of a TokenMoE (metrics "experts"): divergence of the experts' parameters."""

    def __init__(self, model: TokenMoE) -> None:
        self._model = model
        self.state: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, Any]:
        layers = zip(self._model.blocks, self._model.experts, strict=True)
        return {
            "experts": {str(number): {"divergence": divergence(layer)} for number, layer in layers}
        }
