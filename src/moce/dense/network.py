"""Detectors and segmenters on a plain ViT: torchvision's, and segmentation-models-pytorch's decoder.

This file needs torch, torchvision and timm, and nothing of moce: a copy of it lies in every folder
that `moce finetune` writes, and `load` reads that folder without moce.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors


def load(folder: str | Path) -> nn.Module:
    """The network of a folder that `moce finetune` wrote, ready to predict.

    A detector takes a list of images [c, h, w] of any size, in 0..1, and returns torchvision's
    dictionaries. A segmenter takes [b, c, size, size] in 0..1 and returns logits [b, classes, size, size].
    """
    config = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))["network"]
    network = build_network(config)
    network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return network.eval()


def build_network(config: dict[str, Any], drop_path: float = 0.0) -> nn.Module:
    """A detector or segmenter with fresh weights. config: as `network` in model.json."""
    size = config["image_size"]
    vit = timm.create_model(
        config["architecture"],
        **config["model_args"],
        img_size=size,
        num_classes=0,
        global_pool="",
        drop_path_rate=drop_path,
    )
    build = build_detector if config["task"] == "detect" else build_segmenter
    return build(vit, config)


def vit_of(network: nn.Module) -> Any:
    """The encoder within a detector or segmenter."""
    return next(m for m in network.modules() if isinstance(m, VitFeatures)).vit


# --- features of a ViT ----------------------------------------------------------------------------


class VitFeatures(nn.Module):
    """Patch tokens after some blocks of a timm ViT, after its final norm, as maps [b, width, h, w].

    window: side, in patches, of the windows to which all blocks but four evenly spaced ones restrict
    attention (ViTDet, arXiv 2203.16527); 0: attention is global. It has to divide the grid. With
    windows the class token is left out, as in ViTDet.
    """

    def __init__(self, vit: Any, blocks: Sequence[int], window: int = 0) -> None:
        super().__init__()
        self.vit, self.wanted, self.window = vit, tuple(blocks), window
        self.whole = set(four_blocks(len(vit.blocks)))  # of global attention

    def forward(self, images: Tensor) -> list[Tensor]:
        vit = self.vit
        patch = vit.patch_embed.patch_size
        height, width = images.shape[2] // patch[0], images.shape[3] // patch[1]
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        prefix = vit.num_prefix_tokens
        if self.window:
            tokens, prefix = tokens[:, prefix:], 0
        maps = {}
        for number, block in enumerate(vit.blocks):
            windowed = self.window and number not in self.whole
            run = partial(_in_windows, block, (height, width), self.window) if windowed else block
            if vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(run, tokens, use_reentrant=False)
            else:
                tokens = run(tokens)
            if number in self.wanted:
                patches = vit.norm(tokens)[:, prefix:]
                maps[number] = patches.transpose(1, 2).unflatten(2, (height, width))
        return [maps[number] for number in self.wanted]


def four_blocks(depth: int) -> list[int]:
    """Four evenly spaced blocks, the last one among them; of fewer blocks some come more than once."""
    return [max(0, depth * (n + 1) // 4 - 1) for n in range(4)]


def _in_windows(block: nn.Module, grid: tuple[int, int], window: int, tokens: Tensor) -> Tensor:
    """A block applied within windows of window x window patches; tokens [b, h * w, d]."""
    rows, columns = grid[0] // window, grid[1] // window
    split = tokens.unflatten(1, (rows, window, columns, window)).transpose(2, 3)
    found = block(split.reshape(-1, window * window, tokens.shape[2]))
    back = found.unflatten(0, (-1, rows, columns)).unflatten(3, (window, window))
    return back.transpose(2, 3).reshape(tokens.shape)


def rescale(width: int, scale: float) -> tuple[nn.Module, int]:
    """Layers that resize a map 4-, 2-, 1- or ½-fold, and the number of channels that they give."""
    half, quarter = width // 2, width // 4
    layers: dict[float, tuple[list[nn.Module], int]] = {
        4: (
            [
                nn.ConvTranspose2d(width, half, 2, 2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ],
            quarter,
        ),
        2: ([nn.ConvTranspose2d(width, half, 2, 2)], half),
        1: ([], width),
        0.5: ([nn.MaxPool2d(2)], width),
    }
    found, channels = layers[scale]
    return nn.Sequential(*found), channels


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid: the last map at several scales, and a coarser one by pooling."""

    def __init__(self, vit: Any, dim: int, scales: Sequence[float], window: int) -> None:
        super().__init__()
        self.features = VitFeatures(vit, [len(vit.blocks) - 1], window)
        self.levels = nn.ModuleList(self._level(vit.embed_dim, dim, scale) for scale in scales)
        self.out_channels = dim  # torchvision reads it

    @staticmethod
    def _level(width: int, dim: int, scale: float) -> nn.Module:
        resized, channels = rescale(width, scale)
        return nn.Sequential(
            resized,
            nn.Conv2d(channels, dim, 1, bias=False),
            LayerNorm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            LayerNorm2d(dim),
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        (last,) = self.features(images)
        maps = [level(last) for level in self.levels]
        maps.append(nn.functional.max_pool2d(maps[-1], 1, 2))
        return OrderedDict((str(number), found.float()) for number, found in enumerate(maps))


# --- detection and instance segmentation ----------------------------------------------------------


def build_detector(vit: Any, config: dict[str, Any]) -> FasterRCNN:
    """torchvision's Faster R-CNN, or Mask R-CNN for `masks`, with ViTDet's heads.

    Images are resized by their longer side to image_size and padded to a square, as in training, so
    that the position embedding always fits. Class 0 is the background.
    """
    head, size, dim = config["head"], config["image_size"], config["head"]["dim"]
    backbone = SimplePyramid(vit, dim, head["scales"], config["window"])
    patch = vit.patch_embed.patch_size[0]
    strides = [patch / scale for scale in head["scales"]]
    strides.append(2 * strides[-1])
    anchors = AnchorGenerator(
        tuple((round(head["anchor_scale"] * stride),) for stride in strides),
        (RATIOS,) * len(strides),
    )
    pooled = [str(number) for number in range(len(head["scales"]))]
    convolutions = [dim] * head["depth"]
    heads: dict[str, Any] = {
        "rpn_head": RPNHead(dim, len(RATIOS), conv_depth=2),
        "box_roi_pool": MultiScaleRoIAlign(pooled, 7, 2),
        "box_head": FastRCNNConvFCHead((dim, 7, 7), convolutions, [4 * dim], LayerNorm2d),
        "box_predictor": _BoxPredictor(4 * dim, config["num_classes"] + 1),
    }
    if config["masks"]:
        heads["mask_roi_pool"] = MultiScaleRoIAlign(pooled, 14, 2)
        heads["mask_head"] = MaskRCNNHeads(dim, convolutions or [dim], 1, LayerNorm2d)
        heads["mask_predictor"] = MaskRCNNPredictor(dim, dim, config["num_classes"] + 1)
    network = MaskRCNN if config["masks"] else FasterRCNN
    return network(
        backbone,
        min_size=size,
        max_size=size,
        size_divisible=size,
        image_mean=config["mean"],
        image_std=config["std"],
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=head["proposals"],
        **heads,
    )


class _BoxPredictor(nn.Module):
    """Scores and box refinements of every class, as torchvision's FastRCNNPredictor."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes)
        self.bbox_pred = nn.Linear(width, num_classes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = features.flatten(1)
        return self.cls_score(features), self.bbox_pred(features)


# --- semantic segmentation ------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Images [b, c, size, size] in 0..1 to logits [b, classes, size, size]."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: VitFeatures, head: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.features, self.head = features, head
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.features((images - self.mean) / self.std)).float()
        size = images.shape[2:]
        return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)


class UPerNetHead(nn.Module):
    """UPerNet (arXiv 1807.10221) on the maps of four blocks, at 4, 2, 1 and ½ times their size.

    The decoder is segmentation-models-pytorch's, with layer norm in place of batch norm, which a few
    images per process estimate badly.
    """

    def __init__(self, width: int, dim: int, num_classes: int) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        resized, channels = zip(*(rescale(width, scale) for scale in (4, 2, 1, 0.5)), strict=True)
        self.resized = nn.ModuleList(resized)
        # The decoder skips two maps of full and half resolution, which a ViT does not have.
        self.decoder = UPerNetDecoder([0, 0, *channels], 5, dim)
        _replace_batch_norm(self.decoder)
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        resized = [layers(found) for layers, found in zip(self.resized, maps, strict=True)]
        empty = maps[0].new_empty(0)
        return self.classify(self.decoder([empty, empty, *resized]))


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, LayerNorm2d(child.num_features))
        else:
            _replace_batch_norm(child)


class LinearHead(nn.Module):
    """Logits of every patch from the last map: the cheap protocol."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(maps[-1])


def build_segmenter(vit: Any, config: dict[str, Any]) -> Segmenter:
    """UPerNet on four evenly spaced blocks, as in the MAE paper, or a linear layer on the last one."""
    depth, classes = len(vit.blocks), config["num_classes"]
    if config["head"]["kind"] == "linear":
        features = VitFeatures(vit, [depth - 1], config["window"])
        return Segmenter(features, LinearHead(vit.embed_dim, classes), config)
    head = UPerNetHead(vit.embed_dim, config["head"]["dim"], classes)
    return Segmenter(VitFeatures(vit, four_blocks(depth), config["window"]), head, config)
