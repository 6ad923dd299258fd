"""Diagnostics of expert layers for metrics.jsonl: gate confidence, entropy, images per expert, purity."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moce.data.dataset import ImageDataset
from moce.data.domains import domain_of, find_domains
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
    mean entropy of the gates, in nats; clusters_flipped, clusters_moved: share of the clusters whose
    expert is another than in the last row, and than at the start; divergence: of the experts'
    parameters; purity_by_domain, purity_by_class: share of the images that are of their expert's
    most frequent domain or class, where images have them. Means are over training images.
    """

    def __init__(self, moce: MoCE, kinds: dict[str, Tensor] | None = None) -> None:
        """kinds: [K, kinds] images of every cluster by kind, of "domain" and "class" (`kinds_of`)."""
        self._moce, self._kinds = moce, kinds or {}
        self.state = {"routes": moce.routes(), "start": moce.routes()}

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        moce, routes = self._moce, self._moce.routes()
        flipped, moved = (
            (routes != self.state[name].to(routes.device)).float().mean(dim=0)
            for name in ("routes", "start")
        )
        self.state["routes"] = routes
        weights = moce.cluster_sizes / moce.cluster_sizes.sum()
        rows = {}
        for index, (number, table) in enumerate(zip(moce.blocks, moce.tables(), strict=True)):
            images = torch.zeros(moce.num_experts, device=table.device)
            images = images.index_add_(0, routes[:, index], moce.cluster_sizes)
            entropy = -(table * table.clamp(min=1e-12).log()).sum(dim=1)
            purities = {
                f"purity_by_{name}": purity(counts, routes[:, index])
                for name, counts in self._kinds.items()
            }
            rows[str(number)] = {
                "images_per_expert": images.long().tolist(),
                "max_gate": (weights * table.amax(dim=1)).sum().item(),
                "entropy": (weights * entropy).sum().item(),
                "clusters_flipped": flipped[index].item(),
                "clusters_moved": moved[index].item(),
                "divergence": divergence(moce.experts[index]),
                **purities,
            }
        return {"gates": rows}


def kinds_of(images: ImageDataset, cluster_of: Tensor, num_clusters: int) -> dict[str, Tensor]:
    """Images of every cluster by kind, [K, kinds] int64: by "domain" and by "class".

    A domain is the first folder of an image's id, where these tell images apart, a class its one
    label. Classes are left out unless all images have one and there are at least two.
    """
    kinds: dict[str, list[str]] = {}
    if find_domains(images.ids):
        kinds["domain"] = [domain_of(name) for name in images.ids]
    labels = [label for label in images.labels if isinstance(label, str)]
    if len(labels) == len(images) and len(set(labels)) > 1:
        kinds["class"] = labels
    return {kind: _counted(values, cluster_of, num_clusters) for kind, values in kinds.items()}


def _counted(values: list[str], cluster_of: Tensor, num_clusters: int) -> Tensor:
    """Images by cluster and value, [K, distinct values]."""
    number = {value: n for n, value in enumerate(dict.fromkeys(values))}
    pairs = cluster_of.cpu() * len(number) + torch.tensor([number[value] for value in values])
    return pairs.bincount(minlength=num_clusters * len(number)).view(num_clusters, len(number))


def purity(counts: Tensor, expert_of: Tensor) -> float:
    """Share of the images that are of their expert's most frequent kind.

    counts: [K, kinds] images of every cluster by kind; expert_of: [K] the expert of every cluster.
    """
    counts, expert_of = counts.cpu(), expert_of.cpu()
    of_expert = torch.zeros(int(expert_of.max()) + 1, counts.shape[1], dtype=counts.dtype)
    of_expert.index_add_(0, expert_of, counts)
    return (of_expert.amax(dim=1).sum() / counts.sum()).item()


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
