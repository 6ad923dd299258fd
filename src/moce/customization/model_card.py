"""Write a dense backbone as a folder that timm loads without moce."""

from __future__ import annotations

from pathlib import Path

from moce.customization.selection import Choice, route_name
from moce.runs.files import write_json
from moce.weights.export import Model, write_model_folder

MOST_CLUSTERS = 12  # on a card


def facts_of(choice: Choice) -> list[str]:
    """What a card says of a choice for a task."""
    return [
        f"strategy: {choice.strategy}",
        f"route: {route_name(choice.route)} ({choice.share:.0%} of the task's images)",
        f"clusters: {clusters_of(choice)}",
        f"similarity to the clusters: {choice.similarity:.3f} "
        f"(training images: {choice.training_similarity:.3f})",
    ]


def clusters_of(choice: Choice) -> str:
    """The clusters with most images, as 3 (120 images), 7 (80 images), ..."""
    counts = enumerate(choice.cluster_histogram)
    most = sorted(((n, c) for c, n in counts if n), key=lambda pair: (-pair[0], pair[1]))
    clusters = ", ".join(f"{cluster} ({count} images)" for count, cluster in most[:MOST_CLUSTERS])
    more = len(most) - MOST_CLUSTERS
    return clusters + (f" and {more} more" if more > 0 else "")


def write_choice(folder: Path, kind: str, model: Model, choice: Choice, source: Path) -> str:
    """Write what a task was given: `write_model_folder`, and selection.json; returns how to load it."""
    title = f"Backbone customized by moce from {source.name}"
    facts = [f"source: {source.name}", *facts_of(choice)]
    load_it = write_model_folder(folder, kind, model, title, facts)
    write_json(folder / "selection.json", choice.to_json())
    return load_it
