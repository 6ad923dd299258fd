"""The stages without labels: reconstruct (MAE, MAE+), with experts (MoCE, SDR), by token (TokenMoE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from moce.config import ProbeSettings, TrainingSettings, TrainSettings
from moce.data.augment import TRIES, augment, normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import Batch
from moce.data.rng import Stream, keyed_generator, keyed_normal, keyed_uniform
from moce.models.encoder import EncoderSpec
from moce.models.experts import divergence
from moce.models.mae import MAE, num_kept
from moce.models.moce import MoCE
from moce.models.token_moe import TokenMoE
from moce.runtime.device import bincount, to_device
from moce.training.gate_stats import GateWatch
from moce.training.optimizer import ParameterGroup, parameter_groups
from moce.training.thread_parallel import PART, Losses
from moce.training.trainer import Objective, Step


def cropped(
    batch: Batch, settings: TrainingSettings | ProbeSettings, size: tuple[int, int]
) -> Tensor:
    """Cropped and flipped images of a batch, float32 0..255, [b, c, *size]."""
    uniform = keyed_uniform(settings.seed, Stream.CROP, batch.epochs, batch.rows, 4 * TRIES + 1)
    return augment(batch.pixels, uniform, size, settings.crop_scale, settings.hflip)


def augmented(
    batch: Batch,
    settings: TrainingSettings | ProbeSettings,
    spec: EncoderSpec,
    size: tuple[int, int],
) -> Tensor:
    """Cropped, flipped and normalized images of a batch, float32 [b, c, *size]."""
    return normalize(cropped(batch, settings, size), spec.mean, spec.std)


def mask_noise(batch: Batch, settings: TrainingSettings, mae: MAE) -> Tensor:
    """Uniform noise [b, patches] that decides which patches are hidden."""
    patches = mae.encoder.patch_embed.num_patches
    return keyed_uniform(settings.seed, Stream.MASK, batch.epochs, batch.rows, patches)


def part_size(mae: MAE) -> int:
    """About how many images make a part of a batch, for `moce.training.lanes`."""
    vit = mae.encoder
    tokens = vit.num_prefix_tokens + num_kept(vit.patch_embed.num_patches, mae.mask_ratio)
    return max(1, PART // (tokens * vit.embed_dim))


def mae_objective(
    title: str, mae: MAE, spec: EncoderSpec, images: ImageDataset, settings: TrainingSettings
) -> Objective:
    """Stage 0, and its continuation MAE+."""
    size = mae.encoder.patch_embed.img_size

    def loss(model: nn.Module, batch: Batch, step: Step) -> Losses:
        noise = mask_noise(batch, settings, mae)
        return {"loss": model(augmented(batch, settings, spec, size), noise).loss}

    groups = parameter_groups(mae.parameters(), settings.weight_decay)
    return Objective(title, mae, images, groups, loss, part=part_size(mae))


def moce_objective(
    moce: MoCE, spec: EncoderSpec, images: ImageDataset, cluster_of: Tensor, settings: TrainSettings
) -> Objective:
    """Stage 2, with gates that learn (moce) or are fixed (sdr). cluster_of: [n] int64 clusters."""
    size = moce.mae.encoder.patch_embed.img_size
    clusters_on = lru_cache(maxsize=1)(cluster_of.to)
    gates = _GatesOfStep(moce, cluster_of, settings)

    def loss(model: nn.Module, batch: Batch, step: Step) -> Losses:
        device = batch.rows.device  # the network's; under FSDP `moce` itself stays on the CPU
        output = model(
            augmented(batch, settings, spec, size),
            mask_noise(batch, settings, moce.mae),
            clusters_on(device)[batch.rows],
            *gates(step, device),
        )
        total = output.reconstruction
        if settings.method == "moce":  # fixed gates have nothing to learn
            total = total + settings.balance_weight * output.balance
            total = total + settings.imbalance_weight * output.imbalance
        return {
            "loss": total,
            "reconstruction": output.reconstruction,
            "balance": output.balance,
            "imbalance": output.imbalance,
        }

    is_gate = lambda name: name.startswith("gates.")  # noqa: E731
    groups = expert_groups(moce, settings, is_gate)
    watch = GateWatch(moce)

    @torch.no_grad()
    def by_route(batch: Batch) -> Tensor:
        """So that few experts have the images of a part, and those many."""
        routes = moce.routes()[cluster_of[batch.rows]]
        digits = moce.num_experts ** torch.arange(routes.shape[1]).flip(0)
        return (routes * digits).sum(dim=1).argsort(stable=True)

    return Objective(
        settings.method,
        moce,
        images,
        groups,
        loss,
        watch,
        watch.memory,
        part=part_size(moce.mae),
        order=by_route,
    )


def expert_groups(
    model: nn.Module, settings: TrainSettings, is_gate: Callable[[str], bool]
) -> list[ParameterGroup]:
    """Parameter groups in which the gates, if they learn, have a rate of their own and no decay.

    Gates are few numbers with a task of their own: no decay is to pull them back to undecided.
    """
    rest = [p for name, p in model.named_parameters() if not is_gate(name)]
    gates = [p for name, p in model.named_parameters() if is_gate(name)]
    groups = parameter_groups(rest, settings.weight_decay)
    return groups + parameter_groups(gates, 0.0, settings.gate_lr_scale)


def token_moe_objective(
    model: TokenMoE, spec: EncoderSpec, images: ImageDataset, settings: TrainSettings
) -> Objective:
    """The token-routed baseline of stage 2."""
    size = model.mae.encoder.patch_embed.img_size

    def loss(module: nn.Module, batch: Batch, step: Step) -> Losses:
        noise = mask_noise(batch, settings, model.mae)
        drawn = token_noise(batch, settings, model)
        output = module(augmented(batch, settings, spec, size), noise, drawn)
        total = output.reconstruction + settings.balance_weight * output.balance
        return {
            "loss": total,
            "reconstruction": output.reconstruction,
            "balance": output.balance,
        }

    def watch() -> dict[str, Any]:
        moved = {
            str(layer): {"divergence": divergence(experts)}
            for layer, experts in zip(model.blocks, model.experts, strict=True)
        }
        return {"experts": moved}

    groups = expert_groups(model, settings, lambda name: name.endswith(".gate"))
    return Objective("token_moe", model, images, groups, loss, watch)


def token_noise(batch: Batch, settings: TrainSettings, model: TokenMoE) -> Tensor:
    """N(0, 1) for every image, block, token that the encoder sees and expert, [b, blocks, n, E]."""
    vit = model.mae.encoder
    kept = num_kept(vit.patch_embed.num_patches, model.mae.mask_ratio)
    shape = (len(model.blocks), vit.num_prefix_tokens + kept, settings.num_experts)
    epochs, rows = batch.epochs, batch.rows
    noise = keyed_normal(settings.seed, Stream.TOKEN, epochs, rows, math.prod(shape))
    return noise.view(-1, *shape)


def gate_noise(moce: MoCE, settings: TrainSettings, step: int) -> Tensor | None:
    """N(0, (1/E)^2) for every gate, cluster and expert of a step, [gates, K, E]; None if switched off."""
    if not settings.gate_noise or settings.method == "sdr":
        return None
    generator = keyed_generator(settings.seed, Stream.GATE, step)
    shape = (len(moce.gates), len(moce.clusters), moce.num_experts)
    return torch.randn(shape, generator=generator) / moce.num_experts


class _GatesOfStep:
    """What gates are given, the same for all micro-batches of a step: made, and sent, once for all."""

    def __init__(self, moce: MoCE, cluster_of: Tensor, settings: TrainSettings) -> None:
        self._moce, self._cluster_of, self._settings = moce, cluster_of, settings
        self._step: Step | None = None
        self._made: tuple[Tensor | None, Tensor]

    def __call__(self, step: Step, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Noise of the gates (None: off), and images of each cluster in the whole batch."""
        if step is not self._step:
            noise = gate_noise(self._moce, self._settings, step.number)
            counts = bincount(self._cluster_of[step.rows], len(self._moce.clusters))
            self._made = (
                None if noise is None else to_device(noise, device),
                to_device(counts, device),
            )
            self._step = step
        return self._made
