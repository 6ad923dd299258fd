"""A training step of the masked autoencoder beside Transformers and lightly: speed and peak memory.

    python -m benchmarks.mae_step                     # all parts; half an hour on 2 idle cores
    python -m benchmarks.mae_step --only tiny32       # one part: others' rows in the file stay
    python -m benchmarks.mae_step --device cuda       # on a GPU: bf16, Transformers also compiled
    python -m benchmarks.draw                         # the tables of docs/performance.md

A step is forward, backward and AdamW on images that are there already. The limit is the time of
our step's floating-point operations, counted, at the rate of matrix products of the model's own
shapes, measured in the same turns. Needs: pip install 'moce[bench]'.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.candidates import CONTENDERS, ON_CUDA, SIZES, Case, Size, our_mae
from benchmarks.measure import (
    FOLDER,
    MEGABYTE,
    Row,
    Work,
    chosen,
    in_child,
    in_turns,
    keep,
    options,
    peak_bytes,
    per_second,
)
from moce.models.encoder import use_plain_attention

RESULTS, RESULTS_CUDA = FOLDER / "mae_step.json", FOLDER / "mae_step_cuda.json"
PACKAGES = ("moce", "torch", "timm", "transformers", "lightly")
LIMIT = "matrix products alone"


def cases(size: str, batches: tuple[int, ...], precisions: tuple[str, ...] = ("float32",)):
    return [
        Case(size, batch, threads, precision)
        for batch, threads, precision in product(batches, (1, 2), precisions)
    ]


PARTS = {
    "tiny32": cases("tiny32", (64, 512)),
    "vit_ti": [Case("vit_ti", 16, 2)],
    "vit_s": [Case("vit_s", 16, 2)],
    "vit_b": [Case("vit_b", 32, 2)],
    "memory": [Case("tiny32", 512), Case("vit_s", 16)],
    "memory_vit_b": [Case("vit_b", 64, 2)],
}
SHORT = {
    "tiny32": [Case("tiny32", 64)],
    "memory": [Case("tiny32", 64)],
    "test": [Case("test", 8)],
}
CUDA_PARTS = {
    name: [Case(name, batch, 1, precision, "cuda") for batch in batches for precision in ("bf16",)]
    for name, batches in (
        ("tiny32", (512, 4096)),
        ("vit_ti", (64, 512)),
        ("vit_s", (64, 512)),
        ("vit_b", (64, 256)),
    )
} | {"memory": [Case("vit_b", 64, 1, "bf16", "cuda")]}
REPEATS = {"tiny32": 6, "vit_ti": 4, "vit_s": 4, "vit_b": 2, "test": 2}


def linear_shapes(size: Size, batch: int) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, times) of the linear layers' products of a forward pass."""
    width, depth, _ = size.decoder
    kept = batch * (size.patches // 4 + 1)
    every = batch * (size.patches + 1)
    return [
        (rows, inner * part, inner * other, times)
        for rows, inner, times in ((kept, size.width, size.depth), (every, width, depth))
        for part, other in ((1, 3), (1, 1), (1, 4), (4, 1))
    ]


def products(case: Case) -> Work:
    """All matrix products of the linear layers' forward pass, and nothing else."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    shapes = linear_shapes(SIZES[case.size], case.batch)
    draw = lambda *shape: torch.randn(*shape, device=case.device, dtype=dtype)  # noqa: E731
    operands = [
        (draw(rows, inner), draw(inner, outer), times) for rows, inner, outer, times in shapes
    ]

    def work() -> None:
        for left, right, times in operands:
            for _ in range(times):
                left @ right

    return work


def product_flops(case: Case) -> int:
    shapes = linear_shapes(SIZES[case.size], case.batch)
    return sum(2 * rows * inner * outer * times for rows, inner, outer, times in shapes)


def step_flops(case: Case) -> int:
    """Floating-point operations of one of our steps, counted over a small batch."""
    small = Case(case.size, min(case.batch, 4), device=case.device)
    mae = our_mae(small)
    use_plain_attention(mae)  # the counter knows no fused kernel of CPUs
    with FlopCounterMode(display=False) as counter:
        mae(small.images(), small.noise()).loss.backward()
    return counter.get_total_flops() * case.batch // small.batch


def speed(case: Case, repeats: int) -> list[Row]:
    """Seconds of every candidate's steps, and of the limit."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    flops, share = step_flops(case), step_flops(case) / product_flops(case)
    candidates = ON_CUDA if device.type == "cuda" else CONTENDERS
    steps = {LIMIT: products(case)} | {name: build(case) for name, build in candidates.items()}
    rows = in_turns(steps, repeats, warmups=2 if case.size == "tiny32" else 1, device=device)
    for row in rows:
        row |= vars(case)
        if row["candidate"] == LIMIT:
            row["seconds"] *= share
            row["gflop_per_s"] = round(flops / row["seconds"] / 1e9, 1)
    return per_second(rows, case.batch)


def peak(case: Case, name: str) -> int:
    torch.set_num_threads(case.threads)
    build = (ON_CUDA if case.device == "cuda" else CONTENDERS)[name]
    build(Case("test", 2, device=case.device))()  # imports, and what libraries take for themselves
    return peak_bytes(lambda: build(case), torch.device(case.device))


def memory(case: Case) -> list[Row]:
    """Peak memory of two steps of every candidate, each in a process of its own."""
    rows = []
    candidates = list(ON_CUDA if case.device == "cuda" else CONTENDERS)
    for name in candidates[:2] if case.size == "vit_b" else candidates:  # minutes of CPU each
        megabytes = round(in_child(peak, case, name) / MEGABYTE)
        rows.append({**vars(case), "candidate": name, "peak_mb": megabytes})
        print(case, f"{name:36} {megabytes:6} MB", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__ or "", PARTS, RESULTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args(arguments)
    parts = SHORT if asked.short else PARTS
    if asked.device == "cuda":
        parts, asked.out = CUDA_PARTS, RESULTS_CUDA if asked.out == RESULTS else asked.out
    for name, part in chosen(asked.only, parts).items():
        rows: list[Row] = []
        for case in part:
            repeats = asked.repeats or REPEATS[case.size]
            rows += memory(case) if "memory" in name else speed(case, repeats)
        keep(asked.out, name, rows, PACKAGES, short=asked.short)


if __name__ == "__main__":
    main()
