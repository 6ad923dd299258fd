"""Section Clusters: sizes and sample images of the clusters."""

from __future__ import annotations

from markupsafe import Markup

from moce.errors import MoceError, counted
from moce.reporting.elements import Section, html
from moce.reporting.load import Material, Run
from moce.reporting.style import INK, drawing
from moce.runs.assignments import read_assignments

MOST_CLUSTERS = 100  # with a montage each, to limit the size of the page
BAR = "#5b7c99"


def clusters_section(material: Material, run: Run, max_images: int) -> Section:
    members = members_of(run)
    blocks = [html.chart(_sizes_figure([len(ids) for ids in members]))]
    try:
        source = material.source(str(run.config.get("data")))
    except MoceError as error:
        blocks.append(images_missing(error))
    else:
        shape = _image_shape(run)
        items = []
        for number, ids in enumerate(members[:MOST_CLUSTERS]):
            note = source.describe(ids)
            alt = f"Cluster {number}: {note}"
            picture = source.montage(ids, shape, max_images, 1, alt)
            items.append((f"Cluster {number}", note, picture))
        blocks.append(html.gallery(items))
    lead = (
        "Each row shows random images of one cluster: rows should look alike within and different "
        "from each other, and the bars should be of similar length. Of many clusters, the first "
        f"{MOST_CLUSTERS} are shown."
    )
    return Section(f"clusters-{run.anchor}", run.label, lead, blocks)


def images_missing(error: MoceError) -> Markup:
    return html.note(f"The pictures are left out because the images are gone: {error}.")


def members_of(run: Run) -> list[list[str]]:
    """The ids of every cluster's images."""
    members: list[list[str]] = [[] for _ in range(run.info["clusters"]["num_clusters"])]
    for identity, cluster in read_assignments(run.path).to_dict().items():
        members[cluster].append(identity)
    return members


def _image_shape(run: Run) -> tuple[int, int, int]:
    """Channels, height and width of the images that a run's encoder takes."""
    arguments = run.info["clusters"]["encoder"]["model_args"]
    size = arguments.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return arguments.get("in_chans", 3), height, width


def _sizes_figure(sizes: list[int]) -> Markup:
    alt = (
        f"Bar chart of the sizes of {counted(len(sizes), 'cluster')}, largest first: from {max(sizes):,} "
        f"down to {counted(min(sizes), 'image')}."
    )
    with drawing(2.3, alt) as canvas:
        axes = canvas.figure.subplots()
        axes.bar(range(len(sizes)), sorted(sizes, reverse=True), color=BAR)
        axes.axhline(sum(sizes) / len(sizes), color=INK, linewidth=1, linestyle="--", label="mean")
        axes.set_xticks([])
        axes.set_xlabel(f"{counted(len(sizes), 'cluster')}, largest first")
        axes.set_ylabel("images")
        axes.legend()
    return canvas.picture
