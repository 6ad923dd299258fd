"""Settings that are not given, chosen from the images, the device and the weights at hand.

The learning rates are measured for small models on few images (docs/log.md); from ViT-B on they are
those of the MAE paper, and between them they are guesses, which a run's header says
(`experiments/rates` measures some).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moce.config import ChosenSettings, expand
from moce.runs.model import read_config
from moce.weights.resolve import moce_run

BASE = "vit_base_patch16_224"
OFFICIAL = "vit_base_patch16_224.mae"
# By whether there is an accelerator: (fewest images, encoder, decoder width, blocks, heads).
MODELS = {
    False: [(0, "vit_tiny_patch16_224", 128, 2, 4)],
    True: [(50_000, BASE, 512, 8, 16), (0, "vit_small_patch16_224", 256, 4, 8)],
}
# (longest shorter side of the images, (img_size, patch_size))
SIZES = [(40, (32, 4)), (72, (64, 8)), (144, (96, 8))]
FULL = (224, 16)
# (most parameters of the encoder, base_lr, what is to be told of it)
RATES = [
    (1e6, 4e-3, None),
    (10e6, 4e-3, "extrapolated from encoders of up to 1 M parameters"),
    (40e6, 1e-3, "interpolated between encoders of 1 M and 86 M parameters"),
]
LARGE_RATE = 1.5e-4
LOWER_LR = 0.5  # of the rate that a run was trained with
BASE_LR = 7.5e-5  # for weights of other libraries: half of MAE's own rate
# By whether there is an accelerator: images seen in all, fewest and most epochs.
BUDGET = {False: (200_000, 5, 200), True: (40_000_000, 100, 400)}
CONTINUED = 0.25  # of the epochs, where training starts from weights
MOST_BATCH, FEWEST_BATCH, STEPS_PER_EPOCH = 256, 16, 8


def choose_model(settings: Any, count: int, side: int, accelerated: bool) -> dict[str, Any]:
    """Model settings for `count` images with a typical shorter side of `side` pixels.

    Those that are given stay. With model_args of its own that set more than the channels, the model
    is ViT-B, which they change.
    """
    if settings.model_args.keys() - {"in_chans"}:
        return {"model": BASE}
    fitting = (choice for choice in MODELS[accelerated] if count >= choice[0])
    _, model, *decoder = next(fitting)
    img_size, patch = _size(settings.img_size or side)
    img_size = settings.img_size or img_size
    while img_size % patch:
        patch //= 2
    chosen: dict[str, Any] = {"model": model}
    if (img_size, patch) != FULL:
        chosen["model_args"] = {**settings.model_args, "patch_size": patch}
        chosen["img_size"] = img_size
    names = ("decoder_dim", "decoder_depth", "decoder_heads")
    given = settings.model_fields_set
    return chosen | {n: v for n, v in zip(names, decoder, strict=True) if n not in given}


def _size(side: int) -> tuple[int, int]:
    """img_size and patch_size for images of this shorter side."""
    return next((size for most, size in SIZES if side <= most), FULL)


def choose_training(
    settings: ChosenSettings,
    count: int,
    parameters: int,
    accelerated: bool,
    rate_of_weights: float | None = None,
) -> dict[str, Any]:
    """epochs, batch_size and base_lr where they are not given.

    parameters: of the encoder; rate_of_weights: base_lr for the weights that training starts from.
    """
    chosen: dict[str, Any] = {}
    if settings.epochs is None and settings.steps is None:
        seen, fewest, most = BUDGET[accelerated]
        epochs = max(fewest, min(most, round(seen / count)))
        chosen["epochs"] = max(1, round(epochs * (CONTINUED if rate_of_weights else 1)))
    if settings.batch_size is None:
        chosen["batch_size"] = batch_for(count)
    if settings.base_lr is None:
        chosen["base_lr"] = rate_of_weights or rate_for(parameters)[0]
    return chosen


def rate_for(parameters: int) -> tuple[float, str | None]:
    """base_lr for an encoder of so many parameters, and what it is a guess from, if it is one."""
    by_size = ((rate, guess) for most, rate, guess in RATES if parameters <= most)
    return next(by_size, (LARGE_RATE, None))


def batch_for(count: int) -> int:
    """The largest power of two with at least a few steps per epoch, within bounds."""
    size = MOST_BATCH
    while size > FEWEST_BATCH and size * STEPS_PER_EPOCH > count:
        size //= 2
    return size


def default_lr(weights: Path | str) -> float:
    """base_lr for training that continues from a run, half of its own, or from other weights."""
    run = moce_run(expand(Path(weights)))
    known = read_config(run).get("base_lr") if run is not None else None
    return LOWER_LR * float(known) if known else BASE_LR


def official_weights_here() -> bool:
    """Whether the official MAE weights are in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(f"timm/{OFFICIAL}", "model.safetensors")
    return isinstance(found, str)
