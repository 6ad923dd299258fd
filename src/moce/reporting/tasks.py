"""Section 7: how every task chose its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moce.customization.selection import Route, route_name
from moce.errors import MoceError
from moce.reporting.clusters import sampled_montage
from moce.reporting.elements import Block, Chart, Chip, Facts, Gallery, Item, Picture, Section
from moce.reporting.images import percent
from moce.reporting.load import Material, Run
from moce.reporting.results import PROTOCOLS, SHORT, Results, accuracy_cell
from moce.reporting.style import METHODS, OTHER, ROUTES, SOFT, drawing, expert_chip

SIDE = 32  # pixels of a task's pictures in the montage


def tasks_section(material: Material, results: Results, max_images: int) -> Section:
    blocks: list[Block] = []
    for task, choice in results.selection.items():
        run = _run_of(material, choice)
        routes = _routes(run) if run else []
        blocks.append(Facts(task, _facts(results, task, choice), _chips(run, choice)))
        gallery = _pictures(material, task, max_images)
        if gallery:
            blocks.append(gallery)
        blocks.append(Chart(_figure(task, choice, routes)))
    lead = (
        "Every image of a task votes, by its cluster, for a route through the experts: votes on "
        "one route say that the task is of one kind, and a similarity far below the training "
        "data's own says that the task is unlike anything seen in training."
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


def _chips(run: Run | None, choice: dict[str, Any]) -> Sequence[Chip]:
    if run is None:
        return ()
    return [expert_chip(expert, run.info["spec"]["num_experts"]) for expert in choice["route"]]


def _facts(results: Results, task: str, choice: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("Strategy", str(choice["strategy"])),
        (
            "Winning route",
            f"{route_name(tuple(choice['route']))}, {percent(choice['share'])} of the votes",
        ),
        (
            "Similarity to the clusters",
            f"{choice['similarity']:.3f} (training data {choice['training_similarity']:.3f})",
        ),
    ]
    for protocol, (title, methods) in PROTOCOLS.items():
        cells = {
            SHORT.get(method, METHODS[method].title): accuracy_cell(
                results.values(task, protocol, method)
            ).text
            for method in methods
            if results.values(task, protocol, method)
        }
        if cells:
            text = " · ".join(f"{name} {value}" for name, value in cells.items())
            facts.append((f"{title}, %", text))
    return facts


def _pictures(material: Material, task: str, max_images: int) -> Gallery | None:
    """Some of the task's images, if results.json says under "data" where they are."""
    data = (material.results or {}).get("data", {}).get(task)
    if data is None:
        return None
    try:
        source = material.source(str(data))
    except MoceError:
        return None
    alt = f"Images of the task {task}"
    picture = sampled_montage(source, source.ids, (3, SIDE, SIDE), (2 * max_images, 1), 0, alt)
    return Gallery([Item("", "", picture)]) if picture else None


def _figure(task: str, choice: dict[str, Any], routes: list[Route]) -> Picture:
    votes: dict[str, int] = choice["votes"]
    colors = _colors(votes, routes)
    total = max(1, sum(votes.values()))
    leaders = ", ".join(
        f"{name} {percent(count / total)}" for name, count in list(votes.items())[:3]
    )
    alt = f"Task {task}: images per cluster and votes per route. Most votes: {leaders}."
    with drawing(2.3, alt) as canvas:
        left, right = canvas.figure.subplots(1, 2, width_ratios=[2.6, 1])
        _histogram(left, choice["cluster_histogram"], routes, colors)
        _votes(right, votes, colors)
    return canvas.picture


def _colors(votes: dict[str, int], routes: list[Route]) -> dict[str, str]:
    """One color per route, the same for all tasks: by the clusters on it, most first."""
    names = [route_name(route) for route in routes] or list(votes)
    ranked = sorted(set(names), key=lambda name: (-names.count(name), name))
    return dict(zip(ranked, ROUTES, strict=False))


def _histogram(
    axes: Any, histogram: list[int], routes: list[Route], colors: dict[str, str]
) -> None:
    """Bars of clusters, those of one route beside each other."""
    names = [route_name(route) for route in routes] or [""] * len(histogram)
    ranks = list(colors)
    order = sorted(
        range(len(histogram)),
        key=lambda c: (ranks.index(names[c]) if names[c] in ranks else len(ranks), names[c], c),
    )
    shades = [colors.get(names[cluster], OTHER) for cluster in order]
    axes.bar(range(len(order)), [histogram[c] for c in order], color=shades, width=0.86)
    axes.grid(False, axis="x")
    axes.set_xlim(-0.6, len(order) - 0.4)
    few = len(order) <= 64
    ticks = range(len(order)) if few else []
    axes.set_xticks(ticks, [str(c) for c in order] if few else [], fontsize=7)
    axes.set_title("Images per cluster")
    axes.set_xlabel("cluster, ordered by route", color=SOFT)


def _votes(axes: Any, votes: dict[str, int], colors: dict[str, str]) -> None:
    """Share of the votes of the leading routes, the rest summed up."""
    total = max(1, sum(votes.values()))
    leading = [(name, count) for name, count in votes.items() if count > 0]
    leading.sort(key=lambda item: -item[1])
    shown = leading[:5]
    rest = sum(count for _, count in leading[5:])
    if rest:
        shown.append((f"{len(leading) - 5} others", rest))
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
