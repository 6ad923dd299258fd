"""Section Tasks: how every task chose its experts."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from moce.customization.selection import route_name
from moce.errors import MoceError
from moce.reporting.elements import Section, html
from moce.reporting.load import Material
from moce.reporting.results_table import Results
from moce.reporting.style import ROUTES, drawing

TILE = (3, 32, 32)  # channels, height and width of a task's images in the montage


def tasks_section(material: Material, max_images: int) -> Section | None:
    """The section; None if no MoCE run was customized for a task."""
    choices = choices_of(material.results) if material.results else {}
    if not choices:
        return None
    columns = ["Task", "Strategy", "Winning route", "Votes", "Similarity", "Training data's"]
    rows = [
        [
            task,
            choice["strategy"],
            route_name(tuple(choice["route"])),
            f"{choice['share']:.0%}",
            f"{choice['similarity']:.3f}",
            f"{choice['training_similarity']:.3f}",
        ]
        for task, choice in choices.items()
    ]
    caption = "Similarity: of the task's images to the centroids, beside that of the training data."
    alt = f"Votes of the images of {len(choices)} tasks among routes; the table holds the winners."
    with drawing(1.0 + 0.4 * len(choices), alt) as canvas:
        draw_votes(canvas.figure.subplots(), choices)
    blocks = [html.table(columns, rows, caption), html.chart(canvas.picture, title="Votes")]
    pictures = [(task, "", _picture(material, task, max_images)) for task in choices]
    blocks.append(html.gallery([item for item in pictures if item[2]], "Images of the tasks"))
    lead = (
        "Every image of a task votes, by its cluster, for a route through the experts. Votes for a "
        "single route mean that the task is of one kind; a similarity far below the training data's "
        "own means that the task is unlike anything seen in training."
    )
    return Section("tasks", "Tasks", lead, blocks)


def choices_of(results: Results) -> dict[str, dict[str, Any]]:
    """By task, what the first MoCE run with a strategy selected."""
    return {task: choice for task in results.tasks if (choice := results.choice(task))}


def draw_votes(axes: Any, choices: dict[str, dict[str, Any]]) -> None:
    """One bar per task: the shares of its images that vote for each route, most votes first."""
    routes = sorted({route for choice in choices.values() for route in choice["votes"]})
    for place, choice in enumerate(choices.values()):
        left, total = 0.0, max(1, sum(choice["votes"].values()))
        for route, count in choice["votes"].items():
            color, share = ROUTES[routes.index(route) % len(ROUTES)], count / total
            axes.barh(place, share, left=left, color=color, height=0.62, edgecolor="white")
            if share > 0.2:  # enough room for the name
                axes.text(left + 0.02, place, route, fontsize=7.5, va="center")
            left += share
    axes.set_yticks(range(len(choices)), choices)
    axes.set_xticks([0, 1], ["0", "100 % of the task's images"])
    axes.invert_yaxis()


def _picture(material: Material, task: str, max_images: int) -> Markup | None:
    """Some of the task's images, if they can still be read."""
    assert material.results is not None
    try:
        source = material.source(str(material.results.where(task=task)[0].get("data")))
    except MoceError:
        return None
    return source.montage(source.ids, TILE, max_images, 1, f"Images of the task {task}")
