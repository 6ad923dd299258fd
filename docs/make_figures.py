"""Draw the figures of the README and the docs, and the README's table, from a run of the demo.

make demo && .venv/bin/python docs/make_figures.py runs/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import moce
from moce.customization.bank import Bank
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.evaluation.results import ROWS, read_rows
from moce.inference.reconstructions import reconstruct
from moce.reporting.images import tiled
from moce.reporting.results import choices_of, draw_votes
from moce.reporting.results_table import Results, results_table
from moce.reporting.style import INK, SOFT, expert_color, faded
from moce.runs.assignments import read_assignments
from moce.runs.model import read_config, read_info
from moce.weights.from_runs import load_mae

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
MARK = "<!-- demo results -->"
IMAGES = "demo:pretrain"
GAP = 2  # pixels between images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of the demo, e.g. runs/demo")
    demo = parser.parse_args().demo
    FIGURES.mkdir(exist_ok=True)
    bank = moce.load(demo / "moce")
    images = load_images(IMAGES, (32, 32))
    members = cluster_members(images, demo)
    save(draw_overview(bank, images, members, demo), "overview.png")
    save(draw_clusters(bank, images, members), "clusters.png")
    save(draw_experts(bank), "experts.png")
    save(draw_reconstructions(bank, images, members, demo), "reconstructions.png")
    shutil.copy(demo / "evaluation" / ROWS, DOCS / "demo_results.jsonl")
    write_table(demo)


def save(figure: Figure, name: str) -> None:
    figure.savefig(FIGURES / name, dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.1)
    print(FIGURES / name)


def write_table(demo: Path) -> None:
    """Put the results between the two marks in the README."""
    revision = read_info(demo / "moce")["git_revision"]
    seconds = sum(json.loads((demo / "demo.json").read_text())["seconds"].values())
    used = read_config(demo / "mae")
    origin = f"Revision {revision}, seed {used['seed']}, {seconds:.0f} s on a CPU in {used['precision']}."
    table = results_table(read_rows(demo / "evaluation"))
    before, _, after = (DOCS.parent / "README.md").read_text().split(MARK)
    text = f"{before}{MARK}\n{table}\n\n{origin}\n{MARK}{after}"
    (DOCS.parent / "README.md").write_text(text)


def cluster_members(images: ImageDataset, demo: Path) -> list[list[int]]:
    """Rows of the images of every cluster."""
    cluster_of = read_assignments(demo / "clusters")
    members: list[list[int]] = [[] for _ in range(max(cluster_of.values()) + 1)]
    for row, name in enumerate(images.ids):
        members[cluster_of[name]].append(row)
    return members


def show(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, color=INK, loc="left")


def spread_clusters(bank: Bank, members: list[list[int]], count: int) -> list[int]:
    """Clusters picked evenly from those ordered by route, so that all experts occur."""
    order = sorted(range(len(members)), key=lambda k: bank.model.routes()[k].tolist())
    places = np.linspace(0, len(order) - 1, count).round().astype(int)
    return [order[place] for place in places]


def draw_overview(bank: Bank, images: ImageDataset, members: list[list[int]], demo: Path) -> Figure:
    """From unlabeled images to clusters, experts and a backbone per task."""
    figure = Figure(figsize=(12.5, 3.1))
    first = figure.add_gridspec(1, 2, left=0, right=0.49, wspace=0.05)
    rest = figure.add_gridspec(1, 2, left=0.52, right=1, wspace=0.36, width_ratios=[0.8, 1.2])
    grid = [first[0], first[1], rest[0], rest[1]]
    show(figure.add_subplot(grid[0]), tiled(images.pixels[:81], 9, GAP), "1  unlabeled images")
    rows = [members[k][:9] for k in spread_clusters(bank, members, 9)]
    picture = tiled(images.pixels[[row for strip in rows for row in strip]], 9, GAP)
    show(figure.add_subplot(grid[1]), picture, "2  balanced clusters (rows)")
    draw_map(figure.add_subplot(grid[2]), bank, len(bank.model.blocks) - 1)
    draw_tasks(figure.add_subplot(grid[3]), Results(read_rows(demo / "evaluation")))
    return figure


def draw_map(axes: Axes, bank: Bank, index: int) -> None:
    """Experts (columns) of all clusters (rows) in one MoE block."""
    with torch.no_grad():
        table = bank.model.tables()[index].numpy()
    count = bank.model.num_experts
    order = np.lexsort((-table.max(axis=1), table.argmax(axis=1)))
    colors = [[faded(expert_color(e, count), table[k, e]) for e in range(count)] for k in order]
    axes.imshow(np.array(colors), aspect="auto", interpolation="none")
    axes.set_title("3  an expert per cluster", fontsize=9, color=INK, loc="left")
    axes.set_xticks(range(count), [str(e) for e in range(count)], fontsize=7, color=SOFT)
    axes.set_xlabel(f"experts of block {bank.model.blocks[index]}", fontsize=8, color=SOFT)
    axes.set_yticks([])
    axes.set_ylabel("clusters", fontsize=8, color=SOFT)


def draw_tasks(axes: Axes, results: Results) -> None:
    """The votes of every task's images among routes: the task's own dense ViT takes the winner."""
    draw_votes(axes, choices_of(results))
    axes.set_title("4  per task, a route: one dense ViT", fontsize=9, color=INK, loc="left")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=7, labelcolor=SOFT)


def draw_clusters(bank: Bank, images: ImageDataset, members: list[list[int]]) -> Figure:
    """Twelve clusters, sixteen images each."""
    figure = Figure(figsize=(9, 4.4))
    chosen = spread_clusters(bank, members, 12)
    for place, cluster in enumerate(chosen):
        axes = figure.add_subplot(4, 3, place + 1)
        picture = tiled(images.pixels[members[cluster][:16]], 8, GAP)
        show(axes, picture, f"cluster {cluster}: {len(members[cluster])} images")
    figure.tight_layout(pad=0.6)
    return figure


def draw_experts(bank: Bank) -> Figure:
    """The gates of all MoE blocks."""
    figure = Figure(figsize=(7, 3.4))
    for index, block in enumerate(bank.model.blocks):
        axes = figure.add_subplot(1, len(bank.model.blocks), index + 1)
        draw_map(axes, bank, index)
        axes.set_title(f"block {block}", fontsize=9, color=INK, loc="left")
    figure.tight_layout()
    return figure


def draw_reconstructions(
    bank: Bank, images: ImageDataset, members: list[list[int]], demo: Path
) -> Figure:
    """Input, masked input, and what MAE, MAE+ and the routed experts make of it.

    Predictions are scaled back by the true patches' statistics, visible patches pasted in.
    """
    clusters = spread_clusters(bank, members, 14)
    rows = torch.tensor([members[k][0] for k in clusters])
    rows_shown = {"input": images.pixels[rows]}
    models = {
        "MAE": load_mae(demo / "mae")[1].eval(),
        "MAE+": load_mae(demo / "mae_plus")[1].eval(),
        "MoCE": bank.model,
    }
    for title, model in models.items():
        found = reconstruct(model, bank.encoder_spec, images.pixels[rows], torch.tensor(clusters))
        rows_shown.setdefault("masked", found.masked)
        rows_shown[title] = found.filled
    figure = Figure(figsize=(9, 3.6))
    for place, (title, pixels) in enumerate(rows_shown.items()):
        axes = figure.add_subplot(len(rows_shown), 1, place + 1)
        show(axes, tiled(pixels, len(clusters), GAP))
        axes.text(-8, 16, title, ha="right", va="center", fontsize=9, color=INK)
    figure.subplots_adjust(hspace=0.06)
    return figure


if __name__ == "__main__":
    main()
