"""Choosing an expert for a task's images: one forward pass of the cluster encoder, and little else.

    python -m benchmarks.selection          # a few minutes on 2 idle cores
    python -m benchmarks.draw               # the tables of docs/performance.md

Beside it the bare forward pass of the same encoder over the same pixels, and brute force: every
route reconstructs all the images, and the best one is taken. All start from decoded pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.candidates import SIZES
from benchmarks.measure import FOLDER, Row, Work, chosen, in_turns, keep, options, per_second
from moce.customization.bank import Bank
from moce.customization.selection import Route
from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.from_python import as_image_dataset
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import encode_tokens, pool_tokens
from moce.models.gates import gate_for
from moce.models.moce import MoCE, MoCESpec

RESULTS = FOLDER / "selection.json"
PACKAGES = ("moce", "torch", "timm")
BARE, SELECT, BRUTE = "bare forward pass", "bank.select", "brute force, every route"
BATCH = 256


@dataclass(frozen=True)
class Case:
    size: str
    images: int
    clusters: int
    experts: int = 8
    threads: int = 2


PARTS = {
    "tiny32": [Case("tiny32", 1000, 64, threads=threads) for threads in (1, 2)],
    "vit_ti": [Case("vit_ti", 200, 16)],
}
SHORT = {"tiny32": [Case("tiny32", 200, 16, threads=1)], "test": [Case("test", 40, 8, 4, 1)]}
REPEATS = {"tiny32": 7, "vit_ti": 3, "test": 2}


def bank_of(case: Case) -> Bank:
    """A bank with random weights and centroids: time does not depend on what they are."""
    torch.manual_seed(0)
    spec = SIZES[case.size].spec()
    blocks = tuple(range(1, SIZES[case.size].depth, 2))[-2:]
    width = SIZES[case.size].width
    centroids = torch.nn.functional.normalize(torch.randn(case.clusters, width), dim=1)
    sizes = torch.full((case.clusters,), 100)
    groups = [(torch.arange(case.clusters) * step) % case.experts for step in (1, 3)]
    gates = [gate_for(centroids, group, case.experts, 0.9) for group in groups[-len(blocks) :]]
    model = MoCE(spec.build(), blocks, gates, centroids, sizes).eval()
    moce_spec = MoCESpec(spec, blocks, case.experts, case.clusters, width)
    clusters = ClusterModel(
        centroids=centroids,
        potentials=torch.zeros(case.clusters),
        mean=torch.zeros(width),
        sizes=sizes,
        epsilon=0.05,
        pooling="mean",
        similarity=0.5,
        spec=spec.encoder,
        encoder=spec.encoder.build().eval(),
    )
    return Bank(moce_spec, model, clusters)


@torch.inference_mode()
def bare(vit: VisionTransformer, bank: Bank, pixels: Tensor) -> Tensor:
    """What no selection can do without: pixels to features, batch by batch."""
    spec = bank.encoder_spec
    return torch.cat(
        [
            pool_tokens(vit, encode_tokens(vit, normalize(part, spec.mean, spec.std)), "mean")
            for part in pixels.split(BATCH)
        ]
    )


def brute_force(bank: Bank, images: ImageDataset) -> Route:
    """The route that reconstructs the images best, by the loss of each."""
    losses: dict[Route, float] = {}
    routes = bank.model.routes().tolist()
    for route in bank.routes:
        cluster = routes.index(list(route))
        clusters = torch.full((len(images),), cluster)
        losses[route] = reconstruction_error(
            bank.model, bank.encoder_spec, images, clusters=clusters
        )
    return min(losses, key=lambda route: losses[route])


def speed(case: Case, repeats: int) -> list[Row]:
    torch.set_num_threads(case.threads)
    bank = bank_of(case)
    side = SIZES[case.size].image
    pixels = torch.randint(0, 256, (case.images, 3, side, side), dtype=torch.uint8)
    images = as_image_dataset(pixels, (side, side))
    quick: dict[str, Work] = {
        BARE: lambda: bare(bank.clusters.encoder, bank, pixels),
        SELECT: lambda: bank.select(pixels),
    }
    rows = in_turns(quick, repeats)
    rows += in_turns({BRUTE: lambda: brute_force(bank, images)}, 1, warmups=0)
    labels = {**vars(case), "routes": len(bank.routes)}
    return per_second([row | labels for row in rows], case.images)


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    for name, part in chosen(asked.only, SHORT if asked.short else PARTS).items():
        rows = [row for case in part for row in speed(case, asked.repeats or REPEATS[case.size])]
        keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
