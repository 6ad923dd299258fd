"""Section 5: which clusters go to which expert, what the experts see, how the gates got there."""

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
from moce.reporting.clusters import sampled_montage
from moce.reporting.elements import Block, Chart, Gallery, Item, Note, Picture, Section
from moce.reporting.images import Source, sample
from moce.reporting.load import Material, Run
from moce.reporting.style import (
    SOFT,
    block_colors,
    drawing,
    expert_chip,
    expert_color,
    faded,
    readable_on,
)
from moce.runs.assignments import read_assignments

ASSIGNED_ANEW = 400  # images put through the encoder where the clusters' own run is not to be had
MOST_NUMBERED = 64  # clusters, so that their numbers can be read under the map
GATE_PANELS = (
    ("max_gate", "Confidence: mean largest gate"),
    ("entropy", "Entropy of the gate (nats)"),
    ("clusters_flipped", "Clusters that changed expert (share)"),
    ("divergence", "Divergence of the experts"),
)


def experts_section(material: Material, run: Run, bank: Bank, max_images: int) -> Section:
    blocks: list[Block] = [Chart(_map_figure(bank), _map_caption(bank), "Who goes where")]
    try:
        source = material.source(str(run.config.get("data")))
        blocks += _galleries(material, run, bank, source, max_images)
    except MoceError as error:
        blocks.append(Note(f"The pictures are left out, because the images are gone: {error}."))
    watched = [row for row in run.metrics if row.get("gates")]
    if watched:
        blocks.append(
            Chart(_balance_figure(watched), "Images per expert.", "How the gates settled")
        )
        blocks.append(Chart(_gates_figure(watched), _gates_caption()))
    else:
        blocks.append(Note("Nothing was logged about the gates."))
    lead = (
        "Every cluster goes to one expert in each MoE block; a working mixture has confident "
        "gates, experts with shares of the images of similar size, and experts that move apart."
    )
    return Section(f"experts-{run.anchor}", f"Experts of {run.label}", lead, blocks)


def _map_caption(bank: Bank) -> str:
    return (
        "Gate probabilities: one column per cluster, ordered by route, one row per expert; the "
        f"fuller the color, the surer the gate. {len(bank.routes)} routes are in use."
    )


@torch.no_grad()
def _map_figure(bank: Bank) -> Picture:
    """Per MoE block, experts by clusters, in the expert's color, as full as the gate is sure."""
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
    return canvas.picture


def _frame_map(axes: Any, block: int, count: int, order: list[int]) -> None:
    axes.set_title(f"Block {block}")
    axes.set_yticks(range(count), [f"expert {e}" for e in range(count)])
    axes.grid(False)
    axes.set_xticks([])
    axes.hlines(np.arange(0.5, count - 1), -0.5, len(order) - 0.5, color="#e6e8eb", linewidth=0.6)
    if len(order) <= MOST_NUMBERED:
        axes.set_xticks(range(len(order)), [str(c) for c in order], fontsize=7.5)


def _galleries(
    material: Material, run: Run, bank: Bank, source: Source, max_images: int
) -> list[Block]:
    """Per MoE block, a montage of what each expert sees."""
    identities, clusters = known_clusters(material, run, bank, source)
    routes = bank.model.routes()
    galleries: list[Block] = []
    for index, block in enumerate(bank.model.blocks):
        expert_of = routes[:, index][clusters].tolist()
        seen: list[list[str]] = [[] for _ in range(bank.model.num_experts)]
        for identity, expert in zip(identities, expert_of, strict=True):
            seen[expert].append(identity)
        work = _work(bank, routes[:, index])
        items = [
            _expert_item(expert, ids, work[expert], source, bank, (block, max_images))
            for expert, ids in enumerate(seen)
        ]
        galleries.append(Gallery(items, f"What the experts of block {block} see"))
    return galleries


def _work(bank: Bank, experts: Tensor) -> list[tuple[int, int]]:
    """(clusters, training images) of every expert, by the expert [K] of every cluster."""
    sizes = bank.model.cluster_sizes
    chosen = [experts == number for number in range(bank.model.num_experts)]
    return [(int(mask.sum()), int(sizes[mask].sum())) for mask in chosen]


def _expert_item(
    expert: int,
    ids: list[str],
    work: tuple[int, int],
    source: Source,
    bank: Bank,
    place: tuple[int, int],
) -> Item:
    block, max_images = place
    mix = source.describe(ids)
    note = f"{work[1]:,} images in {work[0]} clusters" + (f" · {mix}" if mix else "")
    alt = f"Images that expert {expert} of block {block} sees{': ' + mix if mix else ''}"
    shape = input_shape(bank.model.mae.encoder)
    picture = sampled_montage(source, ids, shape, (max_images, 2), 1000 * block + expert, alt)
    return Item("Expert", note, picture, [expert_chip(expert, bank.model.num_experts)])


def known_clusters(
    material: Material, run: Run, bank: Bank, source: Source
) -> tuple[list[str], Tensor]:
    """Identities of training images and their clusters, [n] int64.

    From the clusters' own run if it is here and has not changed since; otherwise some images are
    assigned anew. Raises MoceError if there are no images to assign.
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
    return assign_anew(bank, source, sample(source.ids, ASSIGNED_ANEW, 0))


def assign_anew(bank: Bank, source: Source, ids: list[str]) -> tuple[list[str], Tensor]:
    """The clusters of images as the run's own cluster model sees them."""
    images = source.load(ids, bank.input_shape)
    return images.ids, bank.assign(images)[0]


def _per_block(
    rows: list[dict[str, Any]], read: Callable[[dict[str, Any]], Any]
) -> dict[str, tuple[list[float], list[Any]]]:
    """Every MoE block's (epochs, values)."""
    return {
        block: ([row["epoch"] for row in rows], [read(row["gates"][block]) for row in rows])
        for block in rows[-1]["gates"]
    }


def _balance_figure(rows: list[dict[str, Any]]) -> Picture:
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
    return canvas.picture


def _stack(axes: Any, epochs: list[float], work: np.ndarray) -> None:
    """work: [rows, E]. A single row is drawn as if it had been so all the time."""
    if len(epochs) == 1:
        epochs, work = [0.0, *epochs], np.repeat(work, 2, axis=0)
    count = work.shape[1]
    colors = [expert_color(expert, count) for expert in range(count)]
    axes.stackplot(epochs, work.T, colors=colors, edgecolor="white", linewidth=0.6)
    axes.set_xlim(epochs[0], epochs[-1])
    axes.margins(y=0)
    middle = (epochs[0] + epochs[-1]) / 2
    heights = work[len(work) // 2]
    for expert, (height, base) in enumerate(zip(heights, np.cumsum(heights), strict=True)):
        if height > 0.1 * heights.sum():  # room for the words
            ink = readable_on(colors[expert])
            axes.text(
                middle, base - height / 2, f"expert {expert}", ha="center", va="center", color=ink
            )


def _gates_caption() -> str:
    return (
        "Confidence and entropy are means over the images; a certain gate has confidence 1 and "
        "entropy 0. Divergence is how far the experts' weights have moved from each other, "
        "relative to their size."
    )


def _gates_figure(rows: list[dict[str, Any]]) -> Picture:
    last = rows[-1]["gates"]
    ends = "; ".join(f"block {block}: {gate['max_gate']:.2f}" for block, gate in last.items())
    with drawing(4.2, f"Gates over epochs. Confidence at the end, {ends}.") as canvas:
        panels = canvas.figure.subplots(2, 2, sharex=True)
        for axes, (name, title) in zip(panels.flat, GATE_PANELS, strict=True):
            series = _per_block(rows, lambda gate, name=name: gate[name])  # type: ignore[misc]
            colors = block_colors(len(series))
            for color, (block, (epochs, values)) in zip(colors, series.items(), strict=True):
                dots = "o" if len(epochs) < 25 else ""
                axes.plot(
                    epochs,
                    values,
                    color=color,
                    marker=dots,
                    markersize=3.5,
                    label=f"block {block}",
                )
            axes.set_title(title)
        for axes in panels[1]:
            axes.set_xlabel("epochs")
        panels[0, 0].legend(loc="best")
    return canvas.picture
