"""Could gates learn better routes? The error of every cluster's images under every expert.

    python -m experiments.mix32.rerouting runs/mix32/main/0/moce --data runs/mix32/data

A gate can gain by moving a cluster only if another expert reconstructs the cluster's images better
than its own does. This needs one gate for all blocks (`--shared-gate`), so that an expert is a route.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import moce
from experiments.mix32.measure import DOMAINS
from moce.customization.bank import Bank
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.inference.reconstruction_error import reconstruction_error
from moce.models.encoder import input_size
from moce.runs.assignments import read_assignments

PER_CLUSTER = 64  # images whose error is measured, at most


def error_table(bank: Bank, images: ImageDataset, cluster_of: Tensor) -> tuple[Tensor, Tensor]:
    """Errors [K, E] of the images of every cluster under every expert, NaN for clusters without any.

    Also their numbers of images, [K]. All experts see the same masks.
    """
    model = bank.model
    routes = model.routes()[:, 0]
    taken = {int(routes[c]): c for c in range(len(routes))}  # a cluster of every expert
    errors = torch.full((len(routes), model.num_experts), float("nan"))
    for cluster in range(len(routes)):
        rows = (cluster_of == cluster).nonzero().flatten()[:PER_CLUSTER].tolist()
        for expert, example in taken.items():
            if rows:
                asked = torch.full((len(rows),), example)
                errors[cluster, expert] = reconstruction_error(
                    model, bank.encoder_spec, images.subset(rows), clusters=asked
                )
    return errors, cluster_of.bincount(minlength=len(routes))


def compare(errors: Tensor, counts: Tensor, routes: Tensor) -> dict[str, float]:
    """Mean errors by images: on the own expert, on each cluster's best one, and on all in turn.

    elsewhere: share of the clusters that another expert serves better than their own.
    """
    known = ~errors.isnan().all(dim=1)
    errors, share = errors[known], counts[known] / counts[known].sum()
    own = errors.gather(1, routes[known][:, None])[:, 0]
    best = errors.nan_to_num(float("inf")).amin(dim=1)
    return {
        "clusters": int(known.sum()),
        "elsewhere": float((best < own).float().mean()),
        "error_own": float(share @ own),
        "error_best": float(share @ best),
        "error_any": float(share @ errors.nanmean(dim=1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished MoCE run with one gate")
    parser.add_argument("--data", type=Path, required=True, help="folder with pools/ and tasks/")
    given = parser.parse_args()
    bank = moce.load(given.run)
    size, routes = input_size(bank.model.mae.encoder), bank.model.routes()[:, 0]
    pool = load_images(str(given.data / "pools" / "all.parquet"), size)
    stored = read_assignments(given.run.parent / "clusters").to_dict()
    of_pool = torch.tensor([stored[name] for name in pool.ids])
    rows = {"trained on": compare(*error_table(bank, pool, of_pool), routes)}
    for domain, task in DOMAINS.items():
        images = load_images(str(given.data / "tasks" / f"{task}.parquet"), size)
        rows[domain] = compare(*error_table(bank, images, bank.assign(images)[0]), routes)
    for images_of, row in rows.items():
        print(json.dumps({"run": str(given.run), "images": images_of, **row}))


if __name__ == "__main__":
    main()
