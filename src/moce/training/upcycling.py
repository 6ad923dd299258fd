"""Upcycling: turn a trained MAE into a MoCE or TokenMoE whose experts are copies of its FFNs."""

from __future__ import annotations

from torch import Tensor

from moce.clustering.grouping import group_clusters
from moce.config import TrainSettings
from moce.data.rng import Stream, keyed_generator
from moce.errors import MoceError
from moce.models.cluster_model import ClusterModel
from moce.models.gates import gate_for, random_gate
from moce.models.mae import MAE, MAESpec
from moce.models.moce import MoCE, MoCESpec, check_blocks, default_blocks
from moce.models.token_moe import TokenMoE, TokenMoESpec

SDR_CONFIDENCE = 0.99  # of fixed gates: only their argmax matters


def blocks_of(settings: TrainSettings, mae: MAE) -> tuple[int, ...]:
    """Numbers of the blocks that get experts. Raises MoceError if the encoder lacks one."""
    depth = len(mae.encoder.blocks)
    return check_blocks(settings.moe_blocks or default_blocks(depth), depth)


def check_experts(settings: TrainSettings, clusters: ClusterModel) -> None:
    """Raise MoceError if there are more experts than clusters."""
    if settings.num_experts > clusters.num_clusters:
        raise MoceError(
            f"{settings.num_experts} experts need as many clusters, and there are "
            f"{clusters.num_clusters}"
        )


def upcycle(
    settings: TrainSettings, spec: MAESpec, mae: MAE, clusters: ClusterModel, sizes: Tensor
) -> tuple[MoCESpec, MoCE]:
    """A MoCE whose experts are copies of layers of `mae`, which is changed in place.

    sizes: [K] int64, training images per cluster. Raises MoceError if there are more experts than
    clusters, or for blocks that the encoder lacks.
    """
    check_experts(settings, clusters)
    moce_spec = MoCESpec(
        mae=spec,
        blocks=blocks_of(settings, mae),
        num_experts=settings.num_experts,
        num_clusters=clusters.num_clusters,
        cluster_dim=clusters.centroids.shape[1],
        gate_scale=settings.gate_scale,
        expert_scope=settings.expert_scope,
        shared_gate=settings.shared_gate or settings.method == "sdr",
    )
    moce = MoCE(
        mae,
        moce_spec.blocks,
        [initial_gate(settings, clusters.centroids, sizes, n) for n in range(moce_spec.num_gates)],
        clusters.centroids,
        sizes,
        settings.gate_scale,
        settings.balance_scope,
        settings.expert_scope,
        settings.balance_bound,
    )
    if settings.method == "sdr":
        moce.gates.requires_grad_(False)
    return moce_spec, moce


def initial_gate(settings: TrainSettings, centroids: Tensor, sizes: Tensor, number: int) -> Tensor:
    """Initial weights [E, D] of gate `number`: an expert for every group of related clusters.

    All gates start from the same groups, so that an expert of any block sees related images only;
    training may move each gate on its own.
    """
    fixed = settings.method == "sdr"
    if not fixed and settings.gate_init == "random":
        generator = keyed_generator(settings.seed, Stream.GATE, -1 - number)
        width = centroids.shape[1]
        return random_gate(settings.num_experts, width, settings.gate_init_std, generator)
    groups = group_clusters(centroids, sizes, settings.num_experts, settings.balance_bound)
    confidence = SDR_CONFIDENCE if fixed else settings.gate_confidence
    return gate_for(centroids, groups, settings.num_experts, confidence)


def upcycle_by_token(
    settings: TrainSettings, spec: MAESpec, mae: MAE
) -> tuple[TokenMoESpec, TokenMoE]:
    """The token-routed baseline, with experts in the same blocks; changes `mae` in place."""
    token_spec = TokenMoESpec(
        spec, blocks_of(settings, mae), settings.num_experts, settings.gate_scale
    )
    model = TokenMoE(
        mae,
        token_spec.blocks,
        settings.num_experts,
        settings.gate_scale,
        settings.gate_init_std,
    )
    return token_spec, model
