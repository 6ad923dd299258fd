"""Objectives without labels: masked autoencoding (MAE), MoCE and SDR, TokenMoE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moce.config import ProbeSettings, TrainingSettings, TrainSettings
from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.loader import Batch
from moce.data.rng import Stream, keyed_generator, keyed_normal, keyed_uniform
from moce.data.views import Views
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE, num_kept
from moce.models.moce import MoCE
from moce.models.token_moe import TokenMoE
from moce.runtime.device import bincount, to_device
from moce.training.gate_stats import ExpertStats, GateStats, kinds_of
from moce.training.optimizer import ParameterGroup, parameter_groups
from moce.training.thread_parallel import Losses, images_per_chunk
from moce.training.trainer import Objective, Step


def views_of(settings: TrainingSettings | ProbeSettings, size: tuple[int, int]) -> Views:
    """The crops and flips that the settings ask for."""
    height, width = size
    return Views(settings.seed, (height, width), settings.crop_scale, settings.hflip)


def cropped(
    batch: Batch, settings: TrainingSettings | ProbeSettings, size: tuple[int, int]
) -> Tensor:
    """Cropped and flipped images of a batch, uint8 or float32 0..255, [b, c, *size]."""
    return batch.views(views_of(settings, size))


def augmented(
    batch: Batch,
    settings: TrainingSettings | ProbeSettings,
    spec: EncoderSpec,
    size: tuple[int, int],
) -> Tensor:
    """Cropped, flipped and normalized images of a batch, float32 [b, c, *size]."""
    return normalize(cropped(batch, settings, size), spec.mean, spec.std)


def mask_noise(batch: Batch, settings: TrainingSettings, mae: MAE) -> Tensor:
    """Uniform noise [b, patches]; the patches with the largest values are masked."""
    patches = mae.encoder.patch_embed.num_patches
    return keyed_uniform(settings.seed, Stream.MASK, batch.epochs, batch.rows, patches)


def chunk_size(mae: MAE) -> int:
    """Images per chunk of a batch for `ThreadParallel`."""
    vit = mae.encoder
    tokens = vit.num_prefix_tokens + num_kept(vit.patch_embed.num_patches, mae.mask_ratio)
    return images_per_chunk(tokens, vit.embed_dim)


class MAEObjective(Objective):
    """Masked autoencoding: `moce pretrain`, and the methods mae and subset of `moce train`."""

    images: ImageDataset

    def __init__(
        self,
        name: str,
        mae: MAE,
        spec: EncoderSpec,
        images: ImageDataset,
        settings: TrainingSettings,
    ) -> None:
        groups = parameter_groups(mae.parameters(), settings.weight_decay)
        views = views_of(settings, mae.encoder.patch_embed.img_size)
        super().__init__(name, mae, images, groups, chunk_size(mae), views=views)
        self._mae, self._spec, self._settings = mae, spec, settings

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        size = self._mae.encoder.patch_embed.img_size
        images = augmented(batch, self._settings, self._spec, size)
        return {"loss": model(images, mask_noise(batch, self._settings, self._mae)).loss}


class MoCEObjective(Objective):
    """Experts routed by cluster, with gates that learn (method moce) or are fixed (sdr).

    cluster_of: [n] int64, the cluster of every image.
    """

    def __init__(
        self,
        moce: MoCE,
        spec: EncoderSpec,
        images: ImageDataset,
        cluster_of: Tensor,
        settings: TrainSettings,
    ) -> None:
        groups = expert_groups(moce, settings, lambda name: name.startswith("gates."))
        size = chunk_size(moce.mae)
        views = views_of(settings, moce.mae.encoder.patch_embed.img_size)
        stats = GateStats(moce, kinds_of(images, cluster_of, len(moce.clusters)))
        super().__init__(settings.method, moce, images, groups, size, stats, views)
        self._moce, self._spec, self._settings = moce, spec, settings
        self._cluster_of = cluster_of
        self._gate_inputs = _GateInputs(moce, cluster_of, settings)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        device = batch.rows.device  # the model's; under FSDP `self.model` is on the CPU
        if self._cluster_of.device != device:
            self._cluster_of = self._cluster_of.to(device)
        settings, mae = self._settings, self._moce.mae
        output = model(
            augmented(batch, settings, self._spec, mae.encoder.patch_embed.img_size),
            mask_noise(batch, settings, mae),
            self._cluster_of[batch.rows],
            *self._gate_inputs(step, device),
        )
        total = output.reconstruction
        if settings.method == "moce":  # fixed gates learn nothing
            total = total + settings.balance_weight * output.balance
            total = total + settings.imbalance_weight * output.imbalance
        return {
            "loss": total,
            "reconstruction": output.reconstruction,
            "balance": output.balance,
            "imbalance": output.imbalance,
        }

    @torch.no_grad()
    def chunk_order(self, batch: Batch) -> Tensor:
        """By route, so that the images of a chunk go to few experts, many to each."""
        routes = self._moce.routes()[self._cluster_of[batch.rows]]
        digits = self._moce.num_experts ** torch.arange(routes.shape[1]).flip(0)
        return (routes * digits).sum(dim=1).argsort(stable=True)


class TokenMoEObjective(Objective):
    """The token-routed baseline (method token_moe).

    It is not chunked: its balance loss is that of a whole batch of tokens.
    """

    def __init__(
        self, model: TokenMoE, spec: EncoderSpec, images: ImageDataset, settings: TrainSettings
    ) -> None:
        groups = expert_groups(model, settings, lambda name: name.endswith(".gate"))
        views = views_of(settings, model.mae.encoder.patch_embed.img_size)
        super().__init__("token_moe", model, images, groups, None, ExpertStats(model), views)
        self._token_moe, self._spec, self._settings = model, spec, settings

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> Losses:
        settings, mae = self._settings, self._token_moe.mae
        output = model(
            augmented(batch, settings, self._spec, mae.encoder.patch_embed.img_size),
            mask_noise(batch, settings, mae),
            token_noise(batch, settings, self._token_moe),
        )
        total = output.reconstruction + settings.balance_weight * output.balance
        return {
            "loss": total,
            "reconstruction": output.reconstruction,
            "balance": output.balance,
        }


def expert_groups(
    model: nn.Module, settings: TrainSettings, is_gate: Callable[[str], bool]
) -> list[ParameterGroup]:
    """Parameter groups in which gates, if they learn, have their own learning rate and no decay.

    Decay would pull the gates back to undecided.
    """
    rest = [p for name, p in model.named_parameters() if not is_gate(name)]
    gates = [p for name, p in model.named_parameters() if is_gate(name)]
    groups = parameter_groups(rest, settings.weight_decay)
    return groups + parameter_groups(gates, 0.0, settings.gate_lr_scale)


def token_noise(batch: Batch, settings: TrainSettings, model: TokenMoE) -> Tensor:
    """N(0, 1) for every image, MoE block, visible token and expert, [b, blocks, tokens, E]."""
    vit = model.mae.encoder
    kept = num_kept(vit.patch_embed.num_patches, model.mae.mask_ratio)
    shape = (len(model.blocks), vit.num_prefix_tokens + kept, settings.num_experts)
    epochs, rows = batch.epochs, batch.rows
    noise = keyed_normal(settings.seed, Stream.TOKEN, epochs, rows, math.prod(shape))
    return noise.view(-1, *shape)


def gate_noise(moce: MoCE, settings: TrainSettings, step: int) -> Tensor | None:
    """N(0, (1/E)^2) for every gate, cluster and expert of a step, [gates, K, E]; None if disabled."""
    if not settings.gate_noise or settings.method == "sdr":
        return None
    generator = keyed_generator(settings.seed, Stream.GATE, step)
    shape = (len(moce.gates), len(moce.clusters), moce.num_experts)
    return torch.randn(shape, generator=generator) / moce.num_experts


class _GateInputs:
    """Gate noise and cluster counts: the same for all micro-batches of a step, so made once."""

    def __init__(self, moce: MoCE, cluster_of: Tensor, settings: TrainSettings) -> None:
        self._moce, self._cluster_of, self._settings = moce, cluster_of, settings
        self._step: Step | None = None
        self._inputs: tuple[Tensor | None, Tensor]

    def __call__(self, step: Step, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Noise [gates, K, E] (None: disabled), and images per cluster in the whole batch, [K]."""
        if step is not self._step:
            noise = gate_noise(self._moce, self._settings, step.number)
            counts = bincount(self._cluster_of[step.rows], len(self._moce.clusters))
            self._inputs = (
                None if noise is None else to_device(noise, device),
                to_device(counts, device),
            )
            self._step = step
        return self._inputs
