"""What a run tells beside its accuracy: reconstruction per domain, purity, divergence, cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from moce.customization.bank import load
from moce.data.load import load_images
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.encoder import input_size
from moce.runs.assignments import read_assignments
from moce.runs.model import read_info, read_metrics, read_timings
from moce.weights.from_runs import load_mae

# Tasks whose images stand for a domain: none of them was trained on.
DOMAINS = {
    "cifar10": "cifar10",
    "fashion_mnist": "fashion",
    "mnist": "digits",
    "noto_emoji": "twemoji",
}


def measure_run(
    run: Path, backbone: str, data: Path, clusters: Path | None
) -> list[dict[str, Any]]:
    """Measures of one finished run; purity of the clusters is given once, with `mae`."""
    info, log = read_info(run), read_metrics(run)
    found = [
        ("parameters", None, parameters(run)),
        ("train_seconds", None, round(sum_seconds(read_timings(run)), 1)),
    ]
    found += [("reconstruction", *pair) for pair in reconstruction(run, info["kind"], data)]
    found += [("divergence", *pair) for pair in divergences(log)]
    if backbone == "mae" and clusters is not None:
        found.append(("purity", None, purity(clusters)))
    return [
        {"measure": name, "backbone": backbone, "where": where, "value": value}
        for name, where, value in found
    ]


def parameters(run: Path) -> int:
    """Numbers in the weights file that are trained: what has to be stored and shipped."""
    from safetensors import safe_open

    with safe_open(run / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.startswith("clusters.")]  # noqa: SIM118
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)


def sum_seconds(timings: list[dict[str, Any]]) -> float:
    """Time of all logged steps."""
    steps = [row["step"] for row in timings]
    spans = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    return sum(span * row["step_s"] for span, row in zip(spans, timings, strict=True))


def divergences(log: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """How far the experts of each block have moved apart in the end."""
    last = log[-1]
    blocks = last.get("gates", last.get("experts", {}))
    return [(block, round(row["divergence"], 4)) for block, row in blocks.items()]


def purity(clusters: Path) -> float:
    """Share of the images that are of their cluster's most frequent domain."""
    members: dict[int, Counter[str]] = {}
    for name, cluster in read_assignments(clusters).to_dict().items():
        members.setdefault(cluster, Counter())[name.split("/")[0]] += 1
    largest = sum(counter.most_common(1)[0][1] for counter in members.values())
    return round(largest / sum(counter.total() for counter in members.values()), 4)


def reconstruction(run: Path, kind: str, data: Path) -> list[tuple[str, float]]:
    """The error on held-out images of every domain, the same masks for all runs."""
    if kind == "token_moe":
        return []  # its loss stands in its log; nothing dense is handed on
    bank = load(run) if kind == "moce" else None
    spec, mae = (bank.spec.mae, bank.model.mae) if bank else load_mae(run)
    rows = []
    for domain, task in DOMAINS.items():
        images = load_images(str(data / "tasks" / f"{task}.parquet"), input_size(mae.encoder))
        images = images.subset(range(min(1000, len(images))))
        clusters = bank.assign(images)[0] if bank else None
        model = bank.model if bank else mae
        error = reconstruction_error(model, spec.encoder, images, clusters=clusters)
        rows.append((domain, round(error, 5)))
    return rows
