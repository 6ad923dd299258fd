"""A training step of the mixture beside the same step of a dense MAE, and what a whole run costs.

    python -m benchmarks.moce_step                  # about ten minutes on 2 idle cores
    python -m benchmarks.moce_step --only vit_s     # one part: others' rows in the file stay
    python -m benchmarks.draw                       # the tables of docs/performance.md

Every ratio is of steps in the same turn. Balanced: as many images for every expert; skewed: half of
the batch goes to one expert, a quarter to the next, and so on. Idle experts cost nothing: they have
no gradient, and the optimizer leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.candidates import (
    SIZES,
    Case,
    LossOfDraw,
    moce_step,
    our_mae,
    our_step,
)
from benchmarks.measure import FOLDER, Row, Work, chosen, in_turns, keep, options, per_second
from moce.models.encoder import encode_tokens
from moce.models.moce import MoCE
from moce.models.token_moe import TokenMoE
from moce.runtime.device import bincount
from moce.training.objectives import chunk_size

RESULTS = FOLDER / "moce_step.json"
PACKAGES = ("moce", "torch", "timm")
DENSE = "dense MAE"
CERTAIN = 20.0  # logits of gates that have decided


@dataclass(frozen=True)
class Mixture:
    """One mixture to be timed. blocks: how many of the encoder's are MoE blocks."""

    experts: int
    blocks: int = 2
    routes: str = "balanced"
    method: str = "moce"

    @property
    def name(self) -> str:
        return f"{self.method}, E = {self.experts}, {self.blocks} blocks, {self.routes}"


MIXTURES = (
    *(Mixture(experts) for experts in (4, 8, 16)),
    Mixture(8, routes="skewed"),
    Mixture(8, blocks=6),
    Mixture(8, blocks=6, routes="skewed"),
    Mixture(8, method="token_moe"),
)
PARTS: dict[str, list[tuple[Case, tuple[Mixture, ...]]]] = {
    "tiny32": [(Case("tiny32", batch, 2), MIXTURES) for batch in (16, 64)],
    "vit_ti": [(Case("vit_ti", 16, 2), MIXTURES)],
    "vit_b": [(Case("vit_b", 16, 2), MIXTURES[1:2])],
    "vit_b_64": [(Case("vit_b", 64, 2), MIXTURES[1:2])],
    "encoding": [(Case("tiny32", 64, 2), ()), (Case("vit_ti", 16, 2), ())],
}
SHORT: dict[str, list[tuple[Case, tuple[Mixture, ...]]]] = {
    "tiny32": [(Case("tiny32", 16), MIXTURES)],
    "encoding": [(Case("tiny32", 16), ())],
    "test": [(Case("test", 16), MIXTURES)],
}
REPEATS = {"tiny32": 16, "vit_ti": 4, "vit_b": 4, "test": 2}
TASKS = 11  # of the paper


def blocks_of(size: str, count: int) -> tuple[int, ...]:
    """The last odd blocks of an encoder, `count` of them or as many as there are."""
    return tuple(range(1, SIZES[size].depth, 2))[-count:]


def clusters_of(mixture: Mixture, batch: int) -> Tensor:
    """The cluster of every image, [b]: cluster number e is routed to expert e."""
    places = (torch.arange(batch) + 0.5) / batch
    if mixture.routes == "balanced":
        return (places * mixture.experts).long()
    return (-torch.log2(1 - places)).long().clamp(max=mixture.experts - 1)


def mixture_of(case: Case, mixture: Mixture) -> MoCE | TokenMoE:
    """The model, with one cluster per expert and gates that are certain."""
    mae, blocks = our_mae(case), blocks_of(case.size, mixture.blocks)
    if mixture.method == "token_moe":
        return TokenMoE(mae, blocks, mixture.experts).to(case.device).train()
    clusters = torch.eye(mixture.experts)
    gates = [CERTAIN * clusters] * len(blocks)
    moce = MoCE(mae, blocks, gates, clusters, torch.ones(mixture.experts))
    return moce.to(case.device).train()


def loss_of(case: Case, mixture: Mixture) -> LossOfDraw:
    """What a step of training minimizes: reconstruction and the gates' losses.

    Images are in the order of their routes, as the training loop puts them.
    """
    images = case.images()
    if mixture.method == "token_moe":

        def token_loss(model: nn.Module, noise: Tensor, part: slice) -> Tensor:
            output = model(images[part], noise[part])
            return output.reconstruction + 0.01 * output.balance

        return token_loss
    clusters = clusters_of(mixture, case.batch).to(case.device)
    counts = bincount(clusters, mixture.experts)

    def loss(model: nn.Module, noise: Tensor, part: slice) -> Tensor:
        output = model(images[part], noise[part], clusters[part], None, counts)
        return output.reconstruction + 0.01 * (output.balance + output.imbalance)

    return loss


def mixture_step(case: Case, mixture: Mixture) -> Work:
    """As `moce train` takes it: a token MoE, whose balance is that of its whole batch, in one part."""
    model = mixture_of(case, mixture)
    size = chunk_size(model.mae) if isinstance(model, MoCE) else None
    return our_step(case, model, size, loss_of(case, mixture))


def encoding(case: Case) -> dict[str, Work]:
    """Forward passes, without a mask, of the dense encoder and of one route of a mixture made dense."""
    dense = our_mae(case).eval().encoder
    mixture = mixture_of(case, Mixture(8))
    assert isinstance(mixture, MoCE)
    blocks = len(mixture.blocks)
    shares = torch.nn.functional.one_hot(torch.zeros(blocks, dtype=torch.int64), 8).double()
    customized = mixture.dense_encoder(shares, torch.ones_like(shares)).eval()
    images = case.images()

    def forward(vit) -> Work:
        return torch.inference_mode()(lambda: encode_tokens(vit, images))

    return {DENSE: forward(dense), "customized expert": forward(customized)}


def speed(case: Case, mixtures: tuple[Mixture, ...], repeats: int) -> list[Row]:
    """Training steps of the mixtures beside the dense one's; without mixtures, encoding."""
    torch.set_num_threads(case.threads)
    if mixtures:
        work = {DENSE: moce_step(case)}
        work |= {mixture.name: mixture_step(case, mixture) for mixture in mixtures}
    else:
        work = encoding(case)
    rows = in_turns(work, repeats, warmups=2 if case.size == "tiny32" else 1)
    return per_second([row | vars(case) for row in rows], case.batch)


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__ or "", PARTS, RESULTS).parse_args(arguments)
    for name, part in chosen(asked.only, SHORT if asked.short else PARTS).items():
        rows: list[Row] = []
        for case, mixtures in part:
            rows += speed(case, mixtures, asked.repeats or REPEATS[case.size])
        keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
