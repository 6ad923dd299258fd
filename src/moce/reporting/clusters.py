"""Section 4: what the clusters hold."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from moce.errors import MoceError
from moce.reporting.elements import Block, Chart, Chip, Gallery, Item, Note, Picture, Section
from moce.reporting.images import Source, montage, sample, tile_shape
from moce.reporting.load import Material, Run
from moce.reporting.style import SOFT, drawing, expert_chip
from moce.runs.assignments import read_assignments

MOST_TILES = 1200  # pictures in all montages of a clustering: they must not swamp the page
BAR = "#5b7c99"


def clusters_section(material: Material, run: Run, max_images: int) -> Section:
    members = members_of(run)
    blocks: list[Block] = [Chart(_sizes_figure([len(ids) for ids in members]))]
    shown = _shown(len(members), max_images)
    source = None
    try:
        source = material.source(str(run.config.get("data")))
    except MoceError as error:
        blocks.append(Note(f"The pictures are left out, because the images are gone: {error}."))
    if len(shown) < len(members):
        blocks.append(
            Note(f"{len(shown)} of the {len(members)} clusters are shown, evenly spaced.")
        )
    routes = experts_by_cluster(material, len(members))
    items = [
        _item(number, members[number], routes.get(number, ()), source, run, max_images)
        for number in shown
    ]
    blocks.append(Gallery(items))
    lead = (
        "Every row is a random draw of one cluster's images: the rows should look alike within "
        "and different from each other, and the bars should be of similar length."
    )
    if routes:
        lead += " The colored numbers are the cluster's experts, one per MoE block."
    return Section(f"clusters-{run.anchor}", run.label, lead, blocks)


def members_of(run: Run) -> list[list[str]]:
    """The identities of every cluster's images."""
    members: list[list[str]] = [[] for _ in range(run.info["clusters"]["num_clusters"])]
    for identity, cluster in read_assignments(run.path).items():
        members[cluster].append(identity)
    return members


def image_shape(run: Run) -> tuple[int, int, int]:
    """Channels, height and width of the images a run's encoder takes."""
    arguments = run.info["clusters"]["encoder"]["model_args"]
    size = arguments.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return arguments.get("in_chans", 3), height, width


def experts_by_cluster(material: Material, num_clusters: int) -> dict[int, list[Chip]]:
    """Chips of every cluster's experts, one per MoE block, if a run with these clusters is here."""
    for run in material.of_kind("moce"):
        if run.info["spec"]["num_clusters"] == num_clusters:
            count = run.info["spec"]["num_experts"]
            tables = run.info["experts_of_clusters"].values()
            return {
                cluster: [expert_chip(expert, count) for expert in route]
                for cluster, route in enumerate(zip(*tables, strict=True))
            }
    return {}


def _shown(count: int, max_images: int) -> list[int]:
    most = max(1, MOST_TILES // max_images)
    if count <= most:
        return list(range(count))
    return sorted({int(number) for number in np.linspace(0, count - 1, most)})


def _item(
    number: int,
    ids: list[str],
    chips: Sequence[Chip],
    source: Source | None,
    run: Run,
    max_images: int,
) -> Item:
    note = f"{len(ids):,} images"
    picture = None
    if source is not None:
        mix = source.describe(ids)
        note += f" · {mix}" if mix else ""
        alt = f"Images of cluster {number}{': ' + mix if mix else ''}"
        picture = sampled_montage(source, ids, image_shape(run), (max_images, 1), number, alt)
    return Item(f"Cluster {number}", note, picture, chips)


def sampled_montage(
    source: Source,
    ids: Sequence[str],
    image: tuple[int, int, int],
    shape: tuple[int, int],
    number: int,
    alt: str,
) -> Picture | None:
    """A montage of `shape` (columns, rows) of a random draw; None if no image can be read."""
    columns, rows = shape
    try:
        images = source.load(sample(ids, columns * rows, number), tile_shape(image))
    except (MoceError, OSError):
        return None
    return montage(images.take(slice(None)), columns, alt)


def _sizes_figure(sizes: list[int]) -> Picture:
    alt = (
        f"Bar chart of the sizes of {len(sizes)} clusters, largest first: from {max(sizes):,} "
        f"down to {min(sizes):,} images, median {median(sizes):,.0f}."
    )
    with drawing(2.3, alt) as canvas:
        axes = canvas.figure.subplots()
        axes.bar(range(len(sizes)), sorted(sizes, reverse=True), color=BAR, width=0.8)
        mean = sum(sizes) / len(sizes)
        axes.axhline(mean, color="#24262b", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {mean:,.0f}",
            (1, mean),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color="#24262b",
        )
        axes.grid(False, axis="x")
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(sizes)} clusters, largest first", color=SOFT)
        axes.set_ylabel("images")
    return canvas.picture
