"""Protocols of frozen backbones: linear layers on tokens say what a patch shows, and where its box ends."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, nms

from moce.dense import rle
from moce.dense.dataset import DenseImages, split
from moce.dense.metrics import DetectionMetric, SegmentationMetric
from moce.dense.network import LinearHead, VitFeatures
from moce.dense.readers import read_dense
from moce.dense.types import Instances
from moce.weights.from_runs import load_backbone

DRAWS, LABELS = 3, 200  # random draws of so many training images for the linear layers
RIDGE = 1e-4
BOX_RIDGE = 1e-1  # of the layer for boxes, of features of unit variance
# On either side of an object's center, as a share of its width and height: tokens that tell its box.
MIDDLE = 0.25
LEAST_SCORE, OVERLAP, MOST_BOXES = 0.01, 0.5, 100  # as in torchvision's detectors, roughly


def linear(reference: Path, task: Path, seed: int, out: Path) -> dict[str, Any]:
    """A linear layer on the frozen tokens of all blocks; a value per random draw of training images.

    It is fitted to the shares of the classes in every patch, weighted by the inverse root of how
    frequent they are, by L-BFGS. Its logits are resized to the image, as those of moce's linear
    segmenter. Token MoE, which is no plain ViT, can be scored, too.
    """
    train, test, classes = images_of(str(task))
    height, width = train.read(0)[0].shape[1:]
    features = Features(reference, (height, width))
    known, target = features(train), features.shares(train, len(classes))
    unknown, truth = features(test), [mask_of(test.read(row)[1]) for row in range(len(test))]
    mean, deviation = (known.mean((0, 2, 3), True), known.std((0, 2, 3), keepdim=True) + 1e-6)
    known, unknown = (known - mean) / deviation, (unknown - mean) / deviation
    count = min(LABELS, len(train))
    figures = []
    for draw in range(DRAWS if count < len(train) else 1):
        rows = torch.from_numpy(np.random.default_rng([seed, draw]).permutation(len(train))[:count])
        head = fitted(known[rows], target[rows])
        figures.append(segmentation_figures(head, unknown, truth, classes))
    values = [each["miou"] for each in figures]
    means = {name: float(np.mean([each.get(name, 0.0) for each in figures])) for name in figures[0]}
    return {"metric": "miou", "labels": count, "values": values, "figures": means}


@cache
def images_of(task: str) -> tuple[DenseImages, DenseImages, list[str]]:
    """Training and test images; classes of pixels: objects' own, after background, if these are objects."""
    source = read_dense(task, None)
    objects = source.task == "detect"
    return *split(source, 3), (["background"] if objects else []) + source.classes


def mask_of(target: Any) -> np.ndarray:
    """[h, w] int64 class of every pixel; of objects with masks, 1 + the class of each."""
    if isinstance(target, np.ndarray):
        return target
    masks = rle.decode(target.masks, tuple(target.masks[0]["size"]))
    found = np.zeros(masks.shape[1:], np.int64)
    for mask, label in zip(masks, target.classes, strict=True):
        found[mask] = label + 1
    return found


class Features:
    """Frozen patch tokens after every block, of images of one size (h, w)."""

    def __init__(self, reference: Path, size: tuple[int, int]) -> None:
        backbone = load_backbone(str(reference))
        backbone.vit.set_input_size(img_size=size)  # resamples the position embedding
        self.patch = backbone.vit.patch_embed.patch_size[0]
        self.network = VitFeatures(backbone.vit.eval(), range(len(backbone.vit.blocks)))
        self.mean, self.std = (
            torch.tensor(values)[:, None, None]
            for values in (backbone.spec.mean, backbone.spec.std)
        )

    @torch.inference_mode()
    def __call__(self, images: DenseImages) -> Tensor:
        """[n, blocks * width, h / patch, w / patch]."""
        batches = []
        for start in range(0, len(images), 32):
            rows = range(start, min(start + 32, len(images)))
            pixels = torch.from_numpy(np.stack([images.read(row)[0] for row in rows]))
            maps = self.network((pixels.float() / 255 - self.mean) / self.std)
            batches.append(torch.cat(maps, 1))
        return torch.cat(batches)

    def shares(self, images: DenseImages, classes: int) -> Tensor:
        """[n, classes, h / patch, w / patch]: the share of each class in each patch."""
        masks = np.stack([mask_of(images.read(row)[1]) for row in range(len(images))])
        one_hot = nn.functional.one_hot(torch.from_numpy(masks), classes).float()
        return nn.functional.avg_pool2d(one_hot.permute(0, 3, 1, 2), self.patch)


def fitted(features: Tensor, shares: Tensor) -> LinearHead:
    """The layer of least weighted cross entropy, with a small penalty on its weights."""
    shares = shares * shares.mean((0, 2, 3), True).rsqrt()
    head = LinearHead(features.shape[1], shares.shape[1])
    nn.init.zeros_(head.classify.weight)
    nn.init.zeros_(head.classify.bias)  # type: ignore[arg-type]
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head([features]), shares)
        loss = loss + RIDGE * head.classify.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


@torch.inference_mode()
def segmentation_figures(
    head: LinearHead, features: Tensor, truth: list[np.ndarray], classes: list[str]
) -> dict[str, float]:
    metric = SegmentationMetric(classes)
    for found, mask in zip(features, truth, strict=True):
        logits = nn.functional.interpolate(head([found[None]]), mask.shape, mode="bilinear")
        metric.add(logits[0].argmax(0).numpy(), mask)
    return metric.compute()


# --- boxes ----------------------------------------------------------------------------------------------


def boxes(reference: Path, task: Path, seed: int, out: Path) -> dict[str, Any]:
    """Linear layers for object and box of every token of all blocks; COCO's box AP per draw.

    Tokens in the middle of an object are told from the background; from each of them, the distances
    to the sides of its box are predicted, by ridge regression. All classes count as one: a linear
    layer hardly tells pasted digits from each other (AP of ten classes 0.2 %, of one 1.9 %).
    """
    train, test, _ = images_of(str(task))
    height, width = train.read(0)[0].shape[1:]
    features = Features(reference, (height, width))
    known, unknown = features(train), features(test)
    mean, deviation = (known.mean((0, 2, 3), True), known.std((0, 2, 3), keepdim=True) + 1e-6)
    known, unknown = (known - mean) / deviation, (unknown - mean) / deviation
    centers = centers_of(known.shape[2:], features.patch)
    truth = [objects_of(train.read(row)[1]) for row in range(len(train))]
    found = [token_targets(objects, centers, features.patch) for objects in truth]
    labels, sides = (torch.stack(part) for part in zip(*found, strict=True))
    count, figures = min(LABELS, len(train)), []
    for draw in range(DRAWS if count < len(train) else 1):
        rows = torch.from_numpy(np.random.default_rng([seed, draw]).permutation(len(train))[:count])
        one_hot = nn.functional.one_hot(labels[rows], 2).float().permute(0, 3, 1, 2)
        head = fitted(known[rows], one_hot)
        regressed = box_layer(known[rows], labels[rows], sides[rows])
        metric = DetectionMetric(["object"], has_masks=False)
        for row in range(len(test)):
            prediction = detected(
                head, regressed, unknown[row], centers, features.patch, (height, width)
            )
            metric.add(test.ids[row], (height, width), prediction, objects_of(test.read(row)[1]))
        figures.append(metric.compute())
    values = [each["box_ap"] for each in figures]
    means = {name: float(np.mean([each.get(name, 0.0) for each in figures])) for name in figures[0]}
    return {"metric": "box_ap", "labels": count, "values": values, "figures": means}


def objects_of(target: Any) -> Instances:
    """The objects of an image, as of one class."""
    assert isinstance(target, Instances)
    return replace(target, classes=np.zeros_like(target.classes))


def centers_of(size: torch.Size, patch: int) -> Tensor:
    """x and y of the center of every token, in pixels, [h, w, 2]."""
    rows, columns = (torch.arange(count) * patch + patch / 2 for count in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], 2)


def token_targets(objects: Instances, centers: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Whether a token shows an object, [h, w] int64, and the sides of its box from its center.

    Those, [h, w, 4], are in tokens. Of objects that overlap, the smaller one counts.
    """
    labels = torch.zeros(centers.shape[:2], dtype=torch.int64)
    sides = torch.zeros(*centers.shape[:2], 4)
    found = torch.from_numpy(objects.boxes)
    areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    for number in areas.argsort(descending=True).tolist():
        box = found[number]
        middle, extent = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * MIDDLE
        inside = ((centers - middle).abs() <= extent.clamp(min=patch / 2)).all(2)
        labels[inside] = 1
        sides[inside] = (box - centers[inside].repeat(1, 2)) / patch
    return labels, sides


def box_layer(features: Tensor, labels: Tensor, sides: Tensor) -> Tensor:
    """[1 + width, 4]: weights that predict the sides from the features, the bias first."""
    chosen = labels > 0
    known = features.permute(0, 2, 3, 1)[chosen].double()
    known = torch.cat([torch.ones(len(known), 1), known], 1)
    penalty = BOX_RIDGE * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0
    weights = torch.linalg.solve(known.T @ known + penalty, known.T @ sides[chosen].double())
    return weights.float()


@torch.inference_mode()
def detected(
    head: LinearHead,
    layer: Tensor,
    features: Tensor,
    centers: Tensor,
    patch: int,
    size: tuple[int, int],
) -> dict[str, Tensor]:
    """Boxes, scores and labels of an image, as `DetectionMetric` takes them. features: [width, h, w]."""
    scores = head([features[None]])[0].softmax(0)[1].flatten()
    sides = features.flatten(1).T @ layer[1:] + layer[0]
    found = clip_boxes_to_image(centers.reshape(-1, 2).repeat(1, 2) + patch * sides, list(size))
    tokens = ((scores > LEAST_SCORE) & (found[:, 2:] > found[:, :2]).all(1)).nonzero()[:, 0]
    tokens = tokens[nms(found[tokens], scores[tokens], OVERLAP)[:MOST_BOXES]]
    labels = torch.zeros_like(tokens)
    return {"boxes": found[tokens], "scores": scores[tokens], "labels": labels}
