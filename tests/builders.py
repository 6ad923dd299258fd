"""Tiny real models and real images that the tests share."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moce.commands.registry import COMMANDS
from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.loader import all_on_device
from moce.data.readers.parquet import demo_table
from moce.models.encoder import EncoderSpec
from moce.models.gates import gate_for
from moce.models.mae import MAE, MAESpec
from moce.models.moce import MoCE

TINY_NAME = "vit_tiny_patch16_224"
TINY_ARGS = {"patch_size": 4, "img_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
BLOCKS = (1, 3)
CLUSTERS, EXPERTS = 8, 3

# Flags that make every command quick and exactly repeatable.
RUNTIME = {"device": "cpu", "precision": "float32", "threads": 1}
PRETRAIN = {
    **RUNTIME,
    "model": TINY_NAME,
    "model_args": TINY_ARGS,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "batch_size": 32,
    "base_lr": 1e-2,
    "log_every": 1,
}
TRAIN = {
    **RUNTIME,
    "num_experts": EXPERTS,
    "batch_size": 32,
    "base_lr": 1e-2,
    "log_every": 1,
}
# Fine-tuning that is cheap and yet enough to learn something on two dozen images of 16 pixels.
QUICK_TUNING = {
    **RUNTIME,
    "epochs": 2,
    "batch_size": 8,
    "micro_batch_size": None,
    "mixup": 0,
    "cutmix": 0,
}
DENSE = {k: v for k, v in TRAIN.items() if k != "num_experts"}  # methods without experts
HEADROOM = {**DENSE, "steps": 12, "num_groups": 2}


def tiny_encoder(**arguments: Any) -> EncoderSpec:
    return EncoderSpec(TINY_NAME, {**TINY_ARGS, **arguments})


def tiny_spec(norm_pix: bool = True, **arguments: Any) -> MAESpec:
    encoder = tiny_encoder(**arguments)
    return MAESpec(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix=norm_pix)


def tiny_mae(seed: int = 0, **arguments: Any) -> MAE:
    """An MAE whose weights, biases and norms too, are all drawn from the seed."""
    torch.manual_seed(seed)
    mae = tiny_spec(**arguments).build()
    shake(mae, 0.05)
    return mae.eval()


@torch.no_grad()
def shake(module: nn.Module, deviation: float) -> None:
    """Add noise to every trained parameter, so that none is at a special value."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * deviation)


def unit_rows(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def tiny_moce(
    mae: MAE,
    num_experts: int = EXPERTS,
    gate_scale: str = "straight_through",
    num_gates: int = len(BLOCKS),
    different: bool = False,
    confidence: float = 0.6,
    **options: Any,
) -> MoCE:
    """A mixture that every expert takes part in. different: experts are moved apart."""
    clusters = unit_rows(CLUSTERS, 32, seed=7)
    groups = [(torch.arange(CLUSTERS) + n * (1 + torch.arange(CLUSTERS) // 3)) % num_experts
              for n in range(num_gates)]  # fmt: skip
    gates = [gate_for(clusters, group, num_experts, confidence) for group in groups]
    sizes = torch.arange(CLUSTERS) + 3
    moce = MoCE(mae, BLOCKS, gates, clusters, sizes, gate_scale, **options)
    if different:
        torch.manual_seed(11)
        for layer in moce.experts:
            shake(layer, 0.2)
    return moce


@lru_cache
def demo_images(size: tuple[int, int] = (16, 16), count: int = 64) -> ImageDataset:
    """Some embedded images of every source."""
    images = load_images("demo:pretrain", size)
    step = len(images) // count
    return all_on_device(images.subset(range(0, step * count, step)), torch.device("cpu"))


def batch(count: int, size: tuple[int, int] = (16, 16), patch: int = 4, seed: int = 0):
    """Normalized real images [count, 3, h, w], mask noise [count, n] and clusters [count]."""
    spec = EncoderSpec("")
    pixels = demo_images(size).pixels[:count]
    generator = torch.Generator().manual_seed(seed)
    patches = (size[0] // patch) * (size[1] // patch)
    noise = torch.rand(count, patches, generator=generator)
    clusters = torch.randint(CLUSTERS, (count,), generator=generator)
    return normalize(pixels, spec.mean, spec.std), noise, clusters


def planted_features(modes: int, per_mode: int, width: int, spread: float, seed: int = 0):
    """Unit features around `modes` random directions, and the mode of each."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.arange(modes).repeat_interleave(per_mode)
    points = unit_rows(modes, width, seed)[mode]
    points = points + spread * torch.randn(len(mode), width, generator=generator)
    return nn.functional.normalize(points, dim=1), mode


def write_images(folder: Path, per_source: int = 40, offset: int = 0) -> Path:
    """Embedded pre-training images as PNG files in a folder per source."""
    rows = demo_table().to_pylist()
    seen: dict[str, int] = {}
    for row in rows:
        source = row["source"]
        number = seen[source] = seen.get(source, -1) + 1
        if row["role"] == "pretrain" and offset <= number < offset + per_source:
            path = folder / source / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"])
    return folder


def write_task(folder: Path, task: str = "digits", per_class: int = 8, classes: int = 3) -> Path:
    """A labeled task as train/CLASS/*.png and test/CLASS/*.png."""
    counts: dict[tuple[str, str], int] = {}
    kept: list[str] = []
    for row in demo_table().to_pylist():
        label, split = row["label"], row["split"]
        if row["task"] != task or (label not in kept and len(kept) == classes):
            continue
        kept += [] if label in kept else [label]
        number = counts[label, split] = counts.get((label, split), -1) + 1
        if number < per_class:
            path = folder / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"])
    return folder


def copy_run(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def customize(run: Path, images: object, out: Path, **settings: Any) -> Any:
    """`moce customize`, as the command line calls it."""
    values = {"run": run, "images": str(images), "out": out, **RUNTIME, **settings}
    return COMMANDS["customize"].run(values)


def picture(color=(200, 30, 60), size=(20, 20), mode="RGB") -> Image.Image:
    return Image.new("RGB", size, color).convert(mode)


def middle(pixels) -> list[int]:
    return np.asarray(pixels)[:, 8, 8].tolist()
