"""Section Tasks: how every task chose its experts."""

from __future__ import annotations

from typing import Any

from moce.customization.selection import Route, route_name
from moce.errors import MoceError
from moce.reporting.elements import Block, Cell, Chart, Gallery, Item, Picture, Row, Section, Table
from moce.reporting.images import percent
from moce.reporting.load import Material, Run
from moce.reporting.results_table import Results
from moce.reporting.style import OTHER, ROUTES, SOFT, drawing, expert_chip

TILE = (3, 32, 32)  # channels, height and width of a task's images in the montage
MOST_ROUTES = 5
MOST_NUMBERED = 64  # clusters


def tasks_section(material: Material, results: Results, max_images: int) -> Section | None:
    """The section; None if no MoCE run was customized for a task."""
    choices = {task: choice for task in results.tasks if (choice := results.choice(task))}
    if not choices:
        return None
    rows = [_row(material, task, choice) for task, choice in choices.items()]
    columns = ["Task", "Strategy", "Winning route", "Votes", "Similarity", "Training data's"]
    caption = "Similarity: of the task's images to the centroids, beside that of the training data."
    blocks: list[Block] = [Table(caption, columns, rows)]
    for task, choice in choices.items():
        run = _run_of(material, choice)
        blocks.append(Chart(_figure(task, choice, _routes(run) if run else []), title=task))
        if picture := _pictures(material, results, task, max_images):
            blocks.append(Gallery([Item("", "", picture)]))
    lead = (
        "Every image of a task votes, by its cluster, for a route through the experts. Votes for a "
        "single route mean that the task is of one kind; a similarity far below the training data's "
        "own means that the task is unlike anything seen in training."
    )
    return Section("tasks", "Tasks", lead, blocks)


def _run_of(material: Material, choice: dict[str, Any]) -> Run | None:
    """The MoCE run that made a choice: the first with as many clusters."""
    count = len(choice["cluster_histogram"])
    runs = material.of_kind("moce")
    return next((run for run in runs if run.info["spec"]["num_clusters"] == count), None)


def _routes(run: Run) -> list[Route]:
    """Every cluster's route."""
    return list(zip(*run.info["experts_of_clusters"].values(), strict=True))


def _row(material: Material, task: str, choice: dict[str, Any]) -> Row:
    run, route = _run_of(material, choice), choice["route"]
    count = run.info["spec"]["num_experts"] if run else 0
    chips = [expert_chip(expert, count) for expert in route] if run else []
    return [
        task,
        str(choice["strategy"]),
        Cell("" if chips else route_name(tuple(route)), chips=chips),
        percent(choice["share"]),
        f"{choice['similarity']:.3f}",
        f"{choice['training_similarity']:.3f}",
    ]


def _pictures(material: Material, results: Results, task: str, max_images: int) -> Picture | None:
    """Some of the task's images, if they can still be read."""
    data = next((row.get("data") for row in results.of_task(task)), None)
    try:
        source = material.source(str(data))
    except MoceError:
        return None
    return source.montage(source.ids, TILE, 2 * max_images, 1, 0, f"Images of the task {task}")


def _figure(task: str, choice: dict[str, Any], routes: list[Route]) -> Picture:
    votes: dict[str, int] = choice["votes"]
    colors = _colors(votes, routes)
    total = max(1, sum(votes.values()))
    leaders = [f"{name} {percent(count / total)}" for name, count in list(votes.items())[:3]]
    alt = f"Task {task}: images per cluster and votes per route. Most votes: {', '.join(leaders)}."
    with drawing(2.3, alt) as canvas:
        left, right = canvas.figure.subplots(1, 2, width_ratios=[2.6, 1])
        _histogram(left, choice["cluster_histogram"], routes, colors)
        _votes(right, votes, colors)
    return canvas.picture


def _colors(votes: dict[str, int], routes: list[Route]) -> dict[str, str]:
    """One color per route, the same for all tasks: by number of clusters, most first."""
    names = [route_name(route) for route in routes] or list(votes)
    ranked = sorted(set(names), key=lambda name: (-names.count(name), name))
    return dict(zip(ranked, ROUTES, strict=False))


def _histogram(
    axes: Any, histogram: list[int], routes: list[Route], colors: dict[str, str]
) -> None:
    """Bars of clusters, those of one route beside each other."""
    names = [route_name(route) for route in routes] or [""] * len(histogram)
    ranks = {name: rank for rank, name in enumerate(colors)}
    order = sorted(
        range(len(histogram)), key=lambda c: (ranks.get(names[c], len(ranks)), names[c], c)
    )
    shades = [colors.get(names[cluster], OTHER) for cluster in order]
    axes.bar(range(len(order)), [histogram[c] for c in order], color=shades, width=0.86)
    axes.grid(False, axis="x")
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.set_xticks([])
    if len(order) <= MOST_NUMBERED:
        axes.set_xticks(range(len(order)), [str(c) for c in order], fontsize=7)
    axes.set_title("Images per cluster")
    axes.set_xlabel("cluster, ordered by route", color=SOFT)


def _votes(axes: Any, votes: dict[str, int], colors: dict[str, str]) -> None:
    """Vote shares of the leading routes; the others are summed up."""
    total = max(1, sum(votes.values()))
    ranked = sorted(((n, count) for n, count in votes.items() if count > 0), key=lambda v: -v[1])
    shown, rest = ranked[:MOST_ROUTES], ranked[MOST_ROUTES:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    places = range(len(shown))
    shares = [100 * count / total for _, count in shown]
    axes.barh(places, shares, color=[colors.get(name, OTHER) for name, _ in shown], height=0.72)
    for place, share in zip(places, shares, strict=True):
        axes.text(share + 2, place, f"{share:.0f} %", va="center")
    axes.set_yticks(places, [name for name, _ in shown])
    axes.set_ylim(max(4.5, len(shown) - 0.5), -0.6)
    axes.set_xlim(0, 118)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Votes per route")
