"""Section Experts: which clusters go to which expert, what the experts see, how the gates settled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moce.customization.bank import Bank
from moce.errors import MoceError
from moce.models.encoder import input_shape
from moce.reporting.clusters import images_missing
from moce.reporting.elements import Block, Chart, Gallery, Item, Note, Section
from moce.reporting.images import Source, sample
from moce.reporting.load import Material, Run
from moce.reporting.style import (
    RULE,
    SOFT,
    block_colors,
    drawing,
    expert_chip,
    expert_color,
    faded,
    readable_on,
)
from moce.runs.assignments import read_assignments

SAMPLE = 400  # images that are assigned here if the clusters' own run is missing
MOST_NUMBERED = 64  # clusters whose numbers still fit under the map
GATE_PANELS = (
    ("max_gate", "Confidence: mean largest gate"),
    ("entropy", "Entropy of the gate (nats)"),
    ("clusters_flipped", "Clusters that changed expert (share)"),
    ("divergence", "Divergence of the experts"),
)


def experts_section(material: Material, run: Run, bank: Bank, max_images: int) -> Section:
    blocks: list[Block] = [_map_chart(bank)]
    try:
        source = material.source(str(run.config.get("data")))
        blocks += _galleries(material, run, bank, source, max_images)
    except MoceError as error:
        blocks.append(images_missing(error))
    logged = [row for row in run.metrics if row.get("gates")]
    if logged:
        blocks += [_balance_chart(logged), _gates_chart(logged)]
    else:
        blocks.append(Note("Nothing was logged about the gates."))
    lead = (
        "Every cluster goes to one expert in each MoE block. A working mixture has confident gates, "
        "experts with similar numbers of images, and experts that move apart."
    )
    return Section(f"experts-{run.anchor}", f"Experts of {run.label}", lead, blocks)


@torch.no_grad()
def _map_chart(bank: Bank) -> Chart:
    """Per MoE block, experts by clusters, in the expert's color, the fuller the surer the gate."""
    routes = bank.model.routes()
    order = sorted(range(len(routes)), key=lambda cluster: routes[cluster].tolist())
    blocks, count = bank.model.blocks, bank.model.num_experts
    alt = f"Gate probability of {len(order)} clusters over {count} experts in {len(blocks)} MoE blocks."
    with drawing(0.6 + len(blocks) * (0.45 + 0.24 * count), alt) as canvas:
        panels = canvas.figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
        for axes, block, table in zip(panels, blocks, bank.model.tables(), strict=True):
            colors = [
                [faded(expert_color(e, count), float(table[c, e])) for c in order]
                for e in range(count)
            ]
            axes.imshow(np.array(colors), aspect="auto", interpolation="none")
            _frame_map(axes, block, count, order)
        panels[-1].set_xlabel("cluster", color=SOFT)
    caption = (
        "Gate probabilities: one column per cluster, ordered by route, one row per expert; the "
        f"fuller the color, the surer the gate. {len(bank.routes)} routes are in use."
    )
    return Chart(canvas.picture, caption, "Who goes where")


def _frame_map(axes: Any, block: int, count: int, order: list[int]) -> None:
    axes.set_title(f"Block {block}")
    axes.set_yticks(range(count), [f"expert {e}" for e in range(count)])
    axes.grid(False)
    axes.set_xticks([])
    axes.hlines(np.arange(0.5, count - 1), -0.5, len(order) - 0.5, color=RULE, linewidth=0.6)
    if len(order) <= MOST_NUMBERED:
        axes.set_xticks(range(len(order)), [str(c) for c in order], fontsize=7.5)


def _galleries(
    material: Material, run: Run, bank: Bank, source: Source, max_images: int
) -> list[Block]:
    """Per MoE block, a montage of what each expert sees."""
    ids, clusters = _known_clusters(material, run, bank, source)
    count, sizes = bank.model.num_experts, bank.model.cluster_sizes
    shape = input_shape(bank.model.mae.encoder)
    galleries: list[Block] = []
    for experts, block in zip(bank.model.routes().T, bank.model.blocks, strict=True):
        items = []
        for expert in range(count):
            mine = experts == expert
            seen = [
                name for name, is_mine in zip(ids, mine[clusters].tolist(), strict=True) if is_mine
            ]
            mix = source.describe(seen)
            note = f"{int(sizes[mine].sum()):,} images in {int(mine.sum())} clusters"
            alt = f"Images that expert {expert} of block {block} sees{': ' + mix if mix else ''}"
            picture = source.montage(seen, shape, max_images, 2, 1000 * block + expert, alt)
            chips = [expert_chip(expert, count)]
            items.append(Item("Expert", f"{note} · {mix}" if mix else note, picture, chips))
        galleries.append(Gallery(items, f"What the experts of block {block} see"))
    return galleries


def _known_clusters(
    material: Material, run: Run, bank: Bank, source: Source
) -> tuple[list[str], Tensor]:
    """Ids of training images and their clusters, [n] int64.

    Read from the clusters' own run if it exists unchanged; otherwise a sample of the images is
    assigned. Raises MoceError if there are no images.
    """
    folders = [other.path for other in material.of_kind("clusters")]
    for folder in [Path(str(run.config.get("clusters"))), *folders]:
        try:
            known = read_assignments(folder)
        except MoceError:
            continue
        clusters = torch.tensor(list(known.values()))
        sizes = clusters.bincount(minlength=bank.clusters.num_clusters)
        if sizes.tolist() == bank.clusters.sizes.tolist():
            return list(known), clusters
    images = source.load(sample(source.ids, SAMPLE, 0), bank.input_shape)
    return images.ids, bank.assign(images)[0]


def _per_block(
    rows: list[dict[str, Any]], read: Callable[[dict[str, Any]], Any]
) -> dict[str, tuple[list[float], list[Any]]]:
    """Every MoE block's (epochs, values)."""
    epochs = [row["epoch"] for row in rows]
    blocks = rows[-1]["gates"]
    return {block: (epochs, [read(row["gates"][block]) for row in rows]) for block in blocks}


def _balance_chart(rows: list[dict[str, Any]]) -> Chart:
    """Images per expert over the epochs, stacked, one panel per MoE block."""
    series = _per_block(rows, lambda gate: gate["images_per_expert"])
    ends = "; ".join(f"block {block}: {values[-1]}" for block, (_, values) in series.items())
    with drawing(2.5, f"Images per expert over epochs, stacked. At the end, {ends}.") as canvas:
        panels = canvas.figure.subplots(1, len(series), squeeze=False, sharey=True)[0]
        for axes, (block, (epochs, values)) in zip(panels, series.items(), strict=True):
            _stack(axes, epochs, np.array(values))
            axes.set_title(f"Block {block}")
            axes.set_xlabel("epochs")
        panels[0].set_ylabel("images")
    return Chart(canvas.picture, "Images per expert.", "How the gates settled")


def _stack(axes: Any, epochs: list[float], images: np.ndarray) -> None:
    """images: [rows, E]. A single row is drawn as a constant."""
    if len(epochs) == 1:
        epochs, images = [0.0, *epochs], np.repeat(images, 2, axis=0)
    colors = [expert_color(expert, images.shape[1]) for expert in range(images.shape[1])]
    axes.stackplot(epochs, images.T, colors=colors, edgecolor="white", linewidth=0.6)
    axes.set_xlim(epochs[0], epochs[-1])
    axes.margins(y=0)
    middle, heights = (epochs[0] + epochs[-1]) / 2, images[len(images) // 2]
    centers = np.cumsum(heights) - heights / 2
    for expert, (height, center) in enumerate(zip(heights, centers, strict=True)):
        if height > 0.1 * heights.sum():  # enough room for the label
            ink = readable_on(colors[expert])
            axes.text(middle, center, f"expert {expert}", ha="center", va="center", color=ink)


def _gates_chart(rows: list[dict[str, Any]]) -> Chart:
    last = rows[-1]["gates"]
    ends = "; ".join(f"block {block}: {gate['max_gate']:.2f}" for block, gate in last.items())
    with drawing(4.2, f"Gates over epochs. Confidence at the end, {ends}.") as canvas:
        panels = canvas.figure.subplots(2, 2, sharex=True)
        for axes, (name, title) in zip(panels.flat, GATE_PANELS, strict=True):
            series = _per_block(rows, lambda gate, name=name: gate[name])  # type: ignore[misc]
            colors = block_colors(len(series))
            for color, (block, (epochs, values)) in zip(colors, series.items(), strict=True):
                marker = "o" if len(epochs) < 25 else ""
                label = f"block {block}"
                axes.plot(epochs, values, color=color, marker=marker, markersize=3.5, label=label)
            axes.set_title(title)
        for axes in panels[1]:
            axes.set_xlabel("epochs")
        panels[0, 0].legend(loc="best")
    caption = (
        "Confidence and entropy are means over the images: a certain gate has confidence 1 and "
        "entropy 0. Divergence is the distance between the experts' weights, relative to their size."
    )
    return Chart(canvas.picture, caption)
