"""Which anchors and proposals a detector trains on: the same for an image on any number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from moce.data.rng import Stream, keyed_uniform
from moce.runtime.distributed import all_reduce, world_size


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler, with random numbers of each image's own in place of the global generator's.

    seen: how many the last call has sampled; positive: how many of them are of objects.
    """

    def __init__(self, like: BalancedPositiveNegativeSampler, seed: int, stream: Stream) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.seed, self.stream = seed, stream
        self.seen = self.positive = 0

    def start(self, rows: Tensor, epochs: Tensor) -> None:
        """Name the images of the next call: their rows in the data set and their epochs, [b] int64."""
        self.rows, self.epochs = rows, epochs

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the sampled positives and negatives, [n] uint8 each, for every image's matches [n]."""
        self.seen = self.positive = 0
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for matched, row, epoch in zip(matched_idxs, self.rows, self.epochs, strict=True):
            place = epoch[None].to(matched.device), row[None].to(matched.device)
            uniform = keyed_uniform(self.seed, self.stream, *place, len(matched))[0]
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive = _least(uniform, matched >= 1, most)
            count = int(positive.sum())
            negative = _least(uniform, matched == 0, self.batch_size_per_image - count)
            self.seen += count + int(negative.sum())
            self.positive += count
            found[0].append(positive)
            found[1].append(negative)
        return found


def _least(uniform: Tensor, candidates: Tensor, most: int) -> Tensor:
    """[n] uint8: 1 for those of the candidates with the least numbers, at most so many."""
    places = torch.where(candidates)[0]
    chosen = torch.zeros_like(candidates, dtype=torch.uint8)
    chosen[places[uniform[places].argsort(stable=True)[:most]]] = 1
    return chosen


class ImageSampling:
    """The two samplers of a detector, and the losses as if one process had seen the whole batch."""

    def __init__(self, detector: GeneralizedRCNN, seed: int) -> None:
        rpn, heads = detector.rpn, detector.roi_heads
        self.anchors = KeyedSampler(rpn.fg_bg_sampler, seed, Stream.ANCHOR)
        self.proposals = KeyedSampler(heads.fg_bg_sampler, seed, Stream.PROPOSAL)
        rpn.fg_bg_sampler, heads.fg_bg_sampler = self.anchors, self.proposals

    def start(self, rows: Tensor, epochs: Tensor) -> None:
        """Name the images of the next forward pass."""
        self.anchors.start(rows, epochs)
        self.proposals.start(rows, epochs)

    def over_processes(self, losses: dict[str, Tensor], images: int) -> dict[str, Tensor]:
        """Losses whose mean over processes, weighted by images, is that of all their samples.

        torchvision divides by what it has sampled, which differs between the images of processes.
        images: those of this process. All processes have to call it.
        """
        if world_size() == 1:
            return losses
        anchors, proposals = self.anchors, self.proposals
        counts = [anchors.seen, proposals.seen, proposals.positive, images]
        own = torch.tensor(counts, dtype=torch.float64, device=losses["loss_objectness"].device)
        every = all_reduce(own.clone()).clamp(min=1)
        factor = (own / every * every[3] / own[3]).float()
        kind = {"loss_objectness": 0, "loss_rpn_box_reg": 0, "loss_mask": 2}
        return {name: value * factor[kind.get(name, 1)] for name, value in losses.items()}
