"""Published settings of detection and segmentation, and the network that settings describe."""

from __future__ import annotations

from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from moce.config import DetectorHead, FinetuneSettings, SegmenterHead
from moce.config.load import parse
from moce.dense.network import build_network, four_blocks, vit_of
from moce.dense.types import DenseSource, DenseTask
from moce.errors import MoceError
from moce.runtime.progress import log
from moce.weights.from_runs import Backbone

# ViTDet's for ViT-B on COCO (arXiv 2203.16527, table 13) and the MAE paper's for UPerNet on ADE20K
# (appendix A.4), as learning rates per 256 images. The schedule is a cosine here for both.
PUBLISHED: dict[str, dict[str, Any]] = {
    "detect": {
        "image_size": 1024,
        "jitter": (0.1, 2.0),
        "epochs": 100,
        "batch_size": 64,
        "micro_batch_size": None,
        "base_lr": 4e-4,
        "weight_decay": 0.1,
        "layer_decay": 0.7,
        "warmup": 0.0014,
        "min_lr": 0.0,
    },
    "segment": {
        "image_size": 512,
        "jitter": (0.5, 2.0),
        "epochs": 127,
        "batch_size": 16,
        "micro_batch_size": None,
        "base_lr": 1.6e-3,
        "layer_decay": 0.65,
        "warmup": 0.0094,
        "min_lr": 0.0,
    },
}


def by_task(settings: FinetuneSettings) -> FinetuneSettings:
    """Replace defaults by the values published for the task, unless they are given."""
    given = settings.model_fields_set
    published = PUBLISHED[str(settings.task)]
    left = {name: value for name, value in published.items() if name not in given}
    if settings.image_size is None:
        left["image_size"] = published["image_size"]
    if not settings.jitter:
        left["jitter"] = published["jitter"]
    return settings.model_copy(update=left)


def network_config(
    backbone: Backbone, source: DenseSource, settings: FinetuneSettings
) -> dict[str, Any]:
    """What `build_network` needs, as in model.json. Raises MoceError for sizes that do not fit."""
    if not backbone.dense:
        raise MoceError(
            f"{settings.backbone} routes tokens to experts: only dense ViTs can detect or segment"
        )
    task: DenseTask = source.task
    kind = DetectorHead if task == "detect" else SegmenterHead
    try:
        head = parse(kind, settings.head_args)
    except MoceError as error:
        raise MoceError(f"head_args: {error}") from None
    patch, arguments = _patch(backbone, task), dict(backbone.spec.model_args)
    if patch != backbone.vit.patch_embed.patch_size[0]:
        arguments["patch_size"] = patch
    size = settings.image_size
    assert size is not None  # by_task
    _check_sizes(size, patch, settings.window)
    depth = len(backbone.vit.blocks)
    if settings.window and len(set(four_blocks(depth))) == depth:
        raise MoceError(
            f"a ViT of {depth} blocks: attention stays global in all of them; leave out --window"
        )
    drop = ("img_size", "drop_path_rate", "num_classes", "global_pool", "fc_norm")
    return {
        "task": task,
        "architecture": backbone.spec.name,
        "model_args": {name: value for name, value in arguments.items() if name not in drop},
        "image_size": size,
        "window": settings.window,
        "mean": list(backbone.spec.mean),
        "std": list(backbone.spec.std),
        "num_classes": len(source.classes),
        "masks": task == "detect" and settings.masks and source.has_masks,
        "head": head.model_dump(mode="json"),
    }


def _patch(backbone: Backbone, task: DenseTask) -> int:
    """The side of a patch: of a detector a power of 2, which torchvision's pooling relies on."""
    height, width = backbone.vit.patch_embed.patch_size
    if height != width:
        raise MoceError(f"patches of {height}x{width} pixels: dense tasks need square ones")
    if task == "segment" or height & (height - 1) == 0:
        return height
    nearest = 1 << round(height**0.5).bit_length()
    options = [nearest >> 1, nearest, nearest << 1, nearest << 2]
    return min(options, key=lambda side: abs(side - height))


def _check_sizes(size: int, patch: int, window: int) -> None:
    if size % (2 * patch):
        down = max(2 * patch, size - size % (2 * patch))
        raise MoceError(
            f"image_size {size} is no multiple of two patches of {patch} pixels; give {down} or "
            f"{down + 2 * patch}"
        )
    grid = size // patch
    if window and grid % window:
        fits = [n for n in range(2, grid) if grid % n == 0]
        raise MoceError(
            f"a window of {window} patches does not divide the grid of {grid}; give one of "
            f"{', '.join(map(str, fits))}"
        )


def new_network(config: dict[str, Any], backbone: Backbone, drop_path: float) -> nn.Module:
    """A detector or segmenter whose encoder has the backbone's weights, resampled to its sizes."""
    network = build_network(config, drop_path)
    vit: Any = vit_of(network)
    weights: dict[str, Tensor] = dict(backbone.vit.state_dict())
    patch, old_patch = vit.patch_embed.patch_size, backbone.vit.patch_embed.patch_size
    if patch != old_patch:
        name = "patch_embed.proj.weight"
        weights[name] = resample_patch_embed(weights[name], list(patch))
        log(f"patch embedding resampled from {old_patch[0]} to {patch[0]} pixels")
    grid, old_grid = vit.patch_embed.grid_size, backbone.vit.patch_embed.grid_size
    if grid != old_grid:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], list(grid), list(old_grid), prefix
        )
        log(f"position embedding resampled from {_text(old_grid)} to {_text(grid)} patches")
    vit.load_state_dict(weights)
    return network


def _text(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
