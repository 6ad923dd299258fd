"""Gate confidence, entropy, and images per expert."""

from __future__ import annotations

from typing import Any

import torch

from moce.models.experts import divergence
from moce.models.moce import MoCE


class GateWatch:
    """What the gates do, per MoE block, each time it is asked (metrics "gates").

    memory: the routes when it was last asked.
    """

    def __init__(self, moce: MoCE) -> None:
        self._moce = moce
        self.memory = {"routes": moce.routes()}

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        moce, routes = self._moce, self._moce.routes()
        flipped = (routes != self.memory["routes"].to(routes.device)).float().mean(dim=0)
        self.memory["routes"] = routes
        weights = moce.cluster_sizes / moce.cluster_sizes.sum()
        rows = {}
        for index, (layer, table) in enumerate(zip(moce.blocks, moce.tables(), strict=True)):
            expert = routes[:, index]
            work = torch.zeros(moce.num_experts, device=table.device)
            work = work.index_add_(0, expert, moce.cluster_sizes)
            entropy = -(table * table.clamp(min=1e-12).log()).sum(dim=1)
            rows[str(layer)] = {
                "images_per_expert": work.long().tolist(),
                "max_gate": (weights * table.amax(dim=1)).sum().item(),
                "entropy": (weights * entropy).sum().item(),
                "clusters_flipped": flipped[index].item(),
                "divergence": divergence(moce.experts[index]),
            }
        return {"gates": rows}
