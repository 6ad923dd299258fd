"""A detector or segmenter applied to whole images of any size; the score on a test set."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from moce.config import expand
from moce.data.run_ahead import run_ahead
from moce.dense import rle
from moce.dense.dataset import DenseImages
from moce.dense.metrics import DetectionMetric, SegmentationMetric
from moce.dense.network import build_network
from moce.dense.types import DenseTask, Instances
from moce.errors import raise_if_corrupt
from moce.runs.files import read_tensors
from moce.runs.model import INFO, WEIGHTS, read_info
from moce.runtime.device import autocast
from moce.runtime.distributed import shard_range
from moce.runtime.system import worker_threads
from moce.weights.from_runs import load_weights

KINDS: dict[str, DenseTask] = {"detector": "detect", "segmenter": "segment"}  # of model.json
OVERLAP = 1 / 3  # of neighboring windows of a segmenter, as in the MAE paper

Prediction = dict[str, Any] | np.ndarray


@dataclass
class Predictor:
    """A network (dense/network.py), its config, the names of its classes, and where it computes."""

    network: nn.Module
    config: dict[str, Any]
    classes: list[str]
    device: torch.device
    precision: str

    def __post_init__(self) -> None:
        self.network.to(self.device).eval()

    @property
    def task(self) -> DenseTask:
        return self.config["task"]

    @property
    def channels(self) -> int:
        return len(self.config["mean"])

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray]) -> list[Prediction]:
        """Predictions for images [c, h, w] uint8 of any size.

        To detect: boxes [m, 4] float32 in pixels, scores [m], labels [m] int64 (indices of classes)
        and masks (m RLEs, or None), best first. To segment: the class of every pixel, [h, w] int64.
        """
        with autocast(self.device, self.precision):
            if self.task == "segment":
                return [self._segment(image) for image in images]
            return self._detect(images)

    def _input(self, image: np.ndarray, size: list[int]) -> Tensor:
        """The image in 0..1, resized to (h, w)."""
        pixels = torch.from_numpy(image).to(self.device)
        return F.resize(pixels, size, antialias=True).float() / 255

    def _detect(self, images: list[np.ndarray]) -> list[Prediction]:
        """At the size that the network sees: torchvision's own masks of large images take gigabytes."""
        side = self.config["image_size"]
        sizes = [image.shape[1:] for image in images]
        seen = [[max(1, round(n * side / max(size))) for n in size] for size in sizes]
        inputs = [self._input(image, size) for image, size in zip(images, seen, strict=True)]
        found = self.network(inputs)
        return [_unscaled(*each) for each in zip(found, seen, sizes, strict=True)]

    def _segment(self, image: np.ndarray) -> np.ndarray:
        """Windows along the longer side of the image, whose shorter side fills them; logits add up."""
        side, shape = self.config["image_size"], image.shape[1:]
        seen = [max(side, round(n * side / min(shape))) for n in shape]
        pixels = self._input(image, seen)
        total = torch.zeros(len(self.classes), *seen, device=self.device)
        for top in _starts(seen[0], side):
            for left in _starts(seen[1], side):
                window = slice(top, top + side), slice(left, left + side)
                total[:, *window] += self.network(pixels[None, :, *window])[0].float()
        return _largest(total, (shape[0], shape[1])).cpu().numpy()


def _largest(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of the largest logit [C, h, w] of every pixel of an image of another size, [h, w] int64.

    Class by class: the logits of all classes for a large photograph take gigabytes.
    """
    best = torch.full(size, float("-inf"), device=logits.device)
    found = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for number, values in enumerate(logits):
        resized = F.resize(values[None], list(size), antialias=False)[0]
        better = resized > best
        best = torch.where(better, resized, best)
        found[better] = number
    return found


def _starts(length: int, side: int) -> list[int]:
    """Where windows start that cover `length` and overlap by a third or more."""
    stride = max(1, round(side * (1 - OVERLAP)))
    return [min(start, length - side) for start in range(0, max(1, length - side + stride), stride)]


def _unscaled(found: dict[str, Tensor], seen: list[int], size: tuple[int, int]) -> Prediction:
    """torchvision's prediction for an image seen at another size, for its own size (h, w)."""
    scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2)
    masks = None
    if "masks" in found:
        masks = [
            rle.encode((F.resize(mask, list(size)) > 0.5).cpu().numpy())[0]
            for mask in found["masks"].float()
        ]
    return {
        "boxes": (found["boxes"].float().cpu() * scale).numpy(),
        "scores": found["scores"].float().cpu().numpy(),
        "labels": found["labels"].cpu().numpy() - 1,
        "masks": masks,
    }


def chosen(prediction: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """The detections for which `kept` [m] is True."""
    masks = prediction["masks"]
    if masks is not None:
        masks = [mask for mask, keep in zip(masks, kept, strict=True) if keep]
    return {**{n: prediction[n][kept] for n in ("boxes", "scores", "labels")}, "masks": masks}


def load_predictor(folder: str, device: torch.device, precision: str) -> Predictor:
    """The model of a `moce finetune` run for a dense task. Raises MoceError if it is corrupt."""
    path = expand(Path(folder))
    info = read_info(path)
    with raise_if_corrupt(path / INFO):
        config, classes = dict(info["network"]), [str(name) for name in info["classes"]]
        network = build_network(config)
    load_weights(network, read_tensors(path / WEIGHTS), path)
    return Predictor(network, config, classes, device, precision)


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_all(images: DenseImages, rows: range) -> Generator[tuple[int, np.ndarray, Any]]:
    """(row, pixels, truth) of these images, read by threads ahead of their use."""

    def read(row: int) -> tuple[int, np.ndarray, Any]:
        return row, *images.read(row)

    threads = worker_threads()
    with closing(run_ahead((partial(read, row) for row in rows), threads, 2 * threads)) as found:
        yield from found


def evaluate(predictor: Predictor, images: DenseImages, batch_size: int) -> dict[str, float]:
    """COCO's APs, or IoUs, on images with truth, as their metric names them; processes share them."""
    share = shard_range(len(images))
    detection = DetectionMetric(predictor.classes, bool(predictor.config["masks"]))
    segmentation = SegmentationMetric(predictor.classes)
    for batch in in_batches(read_all(images, range(share.start, share.stop)), batch_size):
        found = predictor([pixels for _, pixels, _ in batch])
        for (row, pixels, truth), prediction in zip(batch, found, strict=True):
            if isinstance(truth, Instances):
                assert isinstance(prediction, dict)
                size = (pixels.shape[1], pixels.shape[2])
                detection.add(images.samples[row].id, size, prediction, truth)
            else:
                assert isinstance(prediction, np.ndarray)
                segmentation.add(prediction, truth)
    return (detection if predictor.task == "detect" else segmentation).compute()
