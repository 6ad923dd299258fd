"""Which base_lr suits a small encoder on few images: short pre-trainings that differ in nothing else.

    python -m experiments.rates.run --out runs/rates        # ViT-Ti and ViT-S; about 6 minutes on 2 idle cores

On the 5,100 embedded images at 32 pixels in patches of 4. A row of `results/rates.jsonl` per training: the
mean loss of its last tenth, at the end of the cosine. Short runs favor high rates, so the best of them is an
upper bound for long ones. Finished trainings are passed over.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import moce
from experiments.mix32.collect import merge
from moce.runs.model import provenance, read_metrics

HERE = Path(__file__).parent
SHAPE = {"img_size": 32, "model_args": {"patch_size": 4}}
# Model: (decoder width, blocks, heads), as the defaults have them; steps; rates.
CASES: dict[str, tuple[tuple[int, int, int], int, tuple[float, ...]]] = {
    "vit_tiny_patch16_224": ((128, 2, 4), 100, (2e-3, 4e-3, 8e-3)),
    "vit_small_patch16_224": ((256, 4, 8), 40, (1e-3, 2e-3, 4e-3)),
}
TRAINING: dict[str, Any] = {"batch_size": 128, "log_every": 1, "device": "cpu", "workers": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rates.jsonl")
    asked = parser.parse_args()
    for model in asked.models:
        decoder, steps, rates = CASES[model]
        for rate in asked.rates or rates:
            row = _train(asked, model, decoder, asked.steps or steps, rate)
            merge(asked.results, [row])
            print(f"{model} base_lr {rate:g}: loss {row['values'][0]:.4f}")


def _train(
    asked: Any, model: str, decoder: tuple[int, int, int], steps: int, rate: float
) -> dict[str, Any]:
    out = asked.out / f"{model}_{rate:g}_{steps}_{asked.seed}"
    if not (out / "model.json").is_file():
        names = ("decoder_dim", "decoder_depth", "decoder_heads")
        given = {**SHAPE, **TRAINING, **dict(zip(names, decoder, strict=True)), "steps": steps}
        moce.pretrain(
            "demo:pretrain",
            out=out,
            model=model,
            base_lr=rate,
            seed=asked.seed,
            resume=True,
            **given,
        )
    losses = [row["loss"] for row in read_metrics(out)]
    loss = float(np.mean(losses[-max(1, steps // 10) :]))
    named = {
        "backbone": f"{model}@{rate:g}",
        "task": "demo:pretrain",
        "protocol": "pretrain",
        "measure": f"loss after {steps} steps",
    }
    described = {"model": model, "base_lr": rate, "steps": steps, "seed": asked.seed}
    return {**named, **described, "values": [loss], "git_revision": provenance()["git_revision"]}


if __name__ == "__main__":
    main()
