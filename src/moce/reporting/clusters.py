"""Section Clusters: sizes and sample images of the clusters."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from moce.errors import MoceError
from moce.reporting.elements import Block, Chart, Chip, Gallery, Item, Note, Picture, Section
from moce.reporting.images import Source
from moce.reporting.load import Material, Run
from moce.reporting.style import INK, SOFT, drawing, expert_chip
from moce.runs.assignments import read_assignments

MOST_TILES = 1200  # images in all montages of a clustering, to limit the size of the page
BAR = "#5b7c99"


def clusters_section(material: Material, run: Run, max_images: int) -> Section:
    members = members_of(run)
    blocks: list[Block] = [Chart(_sizes_figure([len(ids) for ids in members]))]
    source = None
    try:
        source = material.source(str(run.config.get("data")))
    except MoceError as error:
        blocks.append(images_missing(error))
    most = max(1, MOST_TILES // max_images)
    shown = np.unique(
        np.linspace(0, len(members) - 1, min(most, len(members))).astype(int)
    ).tolist()
    if len(shown) < len(members):
        blocks.append(
            Note(f"{len(shown)} of the {len(members)} clusters are shown, evenly spaced.")
        )
    experts = experts_by_cluster(material, len(members))
    blocks.append(
        Gallery(
            [
                _item(number, members[number], experts.get(number, ()), source, run, max_images)
                for number in shown
            ]
        )
    )
    lead = (
        "Each row shows random images of one cluster: rows should look alike within and different "
        "from each other, and the bars should be of similar length."
    )
    if experts:
        lead += " The colored numbers are the cluster's experts, one per MoE block."
    return Section(f"clusters-{run.anchor}", run.label, lead, blocks)


def images_missing(error: MoceError) -> Note:
    return Note(f"The pictures are left out because the images are gone: {error}.")


def members_of(run: Run) -> list[list[str]]:
    """The ids of every cluster's images."""
    members: list[list[str]] = [[] for _ in range(run.info["clusters"]["num_clusters"])]
    for identity, cluster in read_assignments(run.path).items():
        members[cluster].append(identity)
    return members


def experts_by_cluster(material: Material, num_clusters: int) -> dict[int, list[Chip]]:
    """Chips of every cluster's experts, one per MoE block; empty without a run of as many clusters."""
    for run in material.of_kind("moce"):
        if run.info["spec"]["num_clusters"] == num_clusters:
            count = run.info["spec"]["num_experts"]
            tables = run.info["experts_of_clusters"].values()
            return {
                cluster: [expert_chip(expert, count) for expert in route]
                for cluster, route in enumerate(zip(*tables, strict=True))
            }
    return {}


def _item(
    number: int,
    ids: list[str],
    chips: Sequence[Chip],
    source: Source | None,
    run: Run,
    max_images: int,
) -> Item:
    note, picture = f"{len(ids):,} images", None
    if source is not None:
        mix = source.describe(ids)
        note += f" · {mix}" if mix else ""
        alt = f"Images of cluster {number}{': ' + mix if mix else ''}"
        picture = source.montage(ids, _image_shape(run), max_images, 1, number, alt)
    return Item(f"Cluster {number}", note, picture, chips)


def _image_shape(run: Run) -> tuple[int, int, int]:
    """Channels, height and width of the images that a run's encoder takes."""
    arguments = run.info["clusters"]["encoder"]["model_args"]
    size = arguments.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return arguments.get("in_chans", 3), height, width


def _sizes_figure(sizes: list[int]) -> Picture:
    alt = (
        f"Bar chart of the sizes of {len(sizes)} clusters, largest first: from {max(sizes):,} "
        f"down to {min(sizes):,} images, median {median(sizes):,.0f}."
    )
    mean = sum(sizes) / len(sizes)
    with drawing(2.3, alt) as canvas:
        axes = canvas.figure.subplots()
        axes.bar(range(len(sizes)), sorted(sizes, reverse=True), color=BAR, width=0.8)
        axes.axhline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        place = axes.get_yaxis_transform()
        axes.text(1, mean, f"mean {mean:,.0f}", ha="right", va="bottom", transform=place)
        axes.grid(False, axis="x")
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(sizes)} clusters, largest first", color=SOFT)
        axes.set_ylabel("images")
    return canvas.picture
