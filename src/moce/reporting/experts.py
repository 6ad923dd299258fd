"""Section Experts: which clusters go to which expert, what the experts see, gates over the epochs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from moce.customization.bank import Bank
from moce.errors import MoceError, counted
from moce.models.encoder import input_shape
from moce.reporting.clusters import images_missing
from moce.reporting.elements import Section, html
from moce.reporting.images import Source, sample
from moce.reporting.load import Material, Run
from moce.reporting.style import drawing, expert_color, faded

SAMPLE = 400  # images that are assigned to clusters, to show what each expert sees
GATE_PANELS = (
    ("max_gate", "Confidence: mean largest gate"),
    ("entropy", "Entropy of the gate (nats)"),
    ("clusters_moved", "Clusters with another expert than at the start (share)"),
    ("divergence", "Divergence of the experts"),
    ("purity_by_domain", "Purity by domain"),
    ("purity_by_class", "Purity by class"),
)


def experts_section(material: Material, run: Run, bank: Bank, max_images: int) -> Section:
    blocks = [_map_chart(bank)]
    try:
        source = material.source(str(run.config.get("data")))
        blocks += _galleries(bank, source, max_images)
    except MoceError as error:
        blocks.append(images_missing(error))
    logged = [row for row in run.metrics if row.get("gates")]
    blocks.append(
        _gates_chart(logged) if logged else html.note("Nothing was logged about the gates.")
    )
    lead = (
        "Every cluster goes to one expert in each MoE block. A working mixture has confident gates, "
        "experts with similar numbers of images, and experts that move apart."
    )
    return Section(f"experts-{run.anchor}", f"Experts of {run.label}", lead, blocks)


@torch.no_grad()
def _map_chart(bank: Bank) -> Markup:
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
            axes.set_title(f"Block {block}")
            axes.set_yticks(range(count), [f"expert {e}" for e in range(count)])
            axes.set_xticks([])
            axes.grid(False)
        panels[-1].set_xlabel("clusters, ordered by route")
    caption = (
        "Gate probabilities: one column per cluster, one row per expert; the fuller the color, the "
        f"surer the gate. In use: {counted(len(bank.routes), 'route')}."
    )
    return html.chart(canvas.picture, caption, "Experts of the clusters")


def _galleries(bank: Bank, source: Source, max_images: int) -> list[Markup]:
    """Per MoE block, a montage of what each expert sees."""
    images = source.load(sample(source.ids, SAMPLE), bank.input_shape)
    clusters, sizes = bank.assign(images)[0], bank.model.cluster_sizes
    shape = input_shape(bank.model.mae.encoder)
    galleries = []
    for experts, block in zip(bank.model.routes().T, bank.model.blocks, strict=True):
        items = []
        for expert in range(bank.model.num_experts):
            mine = experts == expert
            ids = [images.ids[row] for row in mine[clusters].nonzero()[:, 0].tolist()]
            note = f"{counted(int(sizes[mine].sum()), 'image')} in {counted(int(mine.sum()), 'cluster')}"
            alt = f"Images that expert {expert} of block {block} sees"
            picture = source.montage(ids, shape, max_images, 2, alt)
            items.append((f"Expert {expert}", note, picture))
        galleries.append(html.gallery(items, f"What the experts of block {block} see"))
    return galleries


def _gates_chart(rows: list[dict[str, Any]]) -> Markup:
    epochs, last = [row["epoch"] for row in rows], rows[-1]["gates"]
    ends = "; ".join(f"block {block}: {gate['max_gate']:.2f}" for block, gate in last.items())
    shown = [
        (name, title)
        for name, title in GATE_PANELS
        if all(name in row["gates"][block] for row in rows for block in last)
    ]
    lines = math.ceil(len(shown) / 2)
    with drawing(2.1 * lines, f"Gates over epochs. Confidence at the end, {ends}.") as canvas:
        panels = canvas.figure.subplots(lines, 2, sharex=True, squeeze=False)
        for axes, (name, title) in zip(panels.flat, shown, strict=False):
            for block in last:
                values = [row["gates"][block][name] for row in rows]
                axes.plot(epochs, values, marker=".", label=f"block {block}")
            axes.set_title(title)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel("epochs")
        panels[0, 0].legend()
    return html.chart(canvas.picture, _gates_caption(last), "Gates during training")


def _gates_caption(last: dict[str, dict[str, Any]]) -> str:
    caption = (
        "Confidence and entropy are means over the images: a certain gate has confidence 1 and "
        "entropy 0. Divergence is the distance between the experts' weights, relative to their size."
    )
    ends = []
    for kind in ("domain", "class"):
        values = [
            gate[f"purity_by_{kind}"] for gate in last.values() if f"purity_by_{kind}" in gate
        ]
        if values:
            low, high = f"{min(values):.2f}", f"{max(values):.2f}"
            ends.append(f"by {kind} {low if low == high else f'{low} to {high}'} at the end")
    if ends:
        caption += (
            " Purity is the share of the images that are of their expert's most frequent kind: "
            f"{', '.join(ends)}."
        )
    return caption
