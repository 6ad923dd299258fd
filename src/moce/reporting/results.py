"""Section Results: every backbone on every task, and the routes that the tasks chose; Headroom."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from moce.customization.selection import route_name
from moce.reporting.elements import Section, html
from moce.reporting.load import Material, Run
from moce.reporting.results_table import Results, protocol_table
from moce.reporting.style import drawing, expert_color, faded, looks_of

PROTOCOLS = {
    "linear": "Linear probe",
    "knn": "Nearest neighbors",
    "finetune": "Fine-tuned",
    "detect": "Detection",
    "segment": "Segmentation",
    "segment_linear": "Segmentation, linear",
}
CAPTION = (
    "In %: mean ± standard deviation over draws of labels. Regret: best strategy, or else best route, "
    "minus MoCE, in points. Vote: share of the task's images that vote for the winning route."
)


def results_section(material: Material) -> Section | None:
    """The section; None without results."""
    results = material.results
    if results is None:
        return None
    blocks = [html.chart(_figure(results), "Whiskers: standard deviation over draws of labels.")]
    for protocol in results.protocols:
        columns, rows = protocol_table(results, protocol)
        caption = f"{PROTOCOLS.get(protocol, protocol)}. {CAPTION}"
        blocks.append(html.table(["task", *columns[1:]], rows, caption, last_apart=True))
    if choices := choices_of(results):
        blocks.append(_votes_chart(choices))
    lead = (
        "The metric on the test images of every task. Compare MoCE with MAE+, which had the same "
        "number of steps; the best route, chosen on one half of the test images and scored on the other, "
        "shows what a better choice of experts could give."
    )
    return Section("results", "Results", lead, blocks)


def _figure(results: Results) -> Markup:
    alt = f"Values of the backbones on {len(results.tasks)} tasks; the tables below hold them."
    with drawing(1.4 + 0.52 * len(results.tasks), alt) as canvas:
        panels = canvas.figure.subplots(1, len(results.protocols), sharey=True, squeeze=False)[0]
        for axes, protocol in zip(panels, results.protocols, strict=True):
            _dots(axes, results, protocol)
        widest = max(panels, key=lambda axes: len(axes.containers))
        canvas.figure.legend(*widest.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return canvas.picture


def _dots(axes: Any, results: Results, protocol: str) -> None:
    """One line per task, with the backbones a little apart."""
    backbones = results.backbones(protocol)
    of_backbone = [results.where(protocol=protocol, backbone=backbone) for backbone in backbones]
    looks = looks_of([rows[0] for rows in of_backbone])
    for number, (rows, look) in enumerate(zip(of_backbone, looks, strict=True)):
        offset = min(0.13, 0.7 / len(backbones)) * (number - (len(backbones) - 1) / 2)
        axes.errorbar(
            [100 * np.mean(row["values"]) for row in rows],
            [results.tasks.index(row["task"]) + offset for row in rows],
            xerr=[100 * np.std(row["values"]) for row in rows],
            fmt=look.marker,
            color=look.color,
            elinewidth=1.3,
            label=look.title,
        )
    axes.set_yticks(range(len(results.tasks)), results.tasks)
    axes.set_ylim(len(results.tasks) - 0.5, -0.5)
    axes.set_xlabel(f"{PROTOCOLS.get(protocol, protocol)}, %")


def choices_of(results: Results) -> dict[str, dict[str, Any]]:
    """By task, what the first MoCE run with a strategy selected."""
    return {task: choice for task in results.tasks if (choice := results.choice(task))}


def draw_votes(axes: Any, choices: dict[str, dict[str, Any]]) -> None:
    """One bar per task: the shares of its images that vote for each route, most votes first."""
    routes = sorted({route for choice in choices.values() for route in choice["votes"]})
    for place, choice in enumerate(choices.values()):
        left, total = 0.0, max(1, sum(choice["votes"].values()))
        for route, count in choice["votes"].items():
            color = faded(expert_color(routes.index(route), len(routes)), 0.6)
            share = count / total
            axes.barh(place, share, left=left, color=color, height=0.62, edgecolor="white")
            if share > 0.2:  # enough room for the name
                axes.text(left + 0.02, place, route, fontsize=7.5, va="center")
            left += share
    axes.set_yticks(range(len(choices)), choices)
    axes.set_xticks([0, 1], ["0", "100 % of the task's images"])
    axes.invert_yaxis()


def _votes_chart(choices: dict[str, dict[str, Any]]) -> Markup:
    winners = [f"{task}: {route_name(tuple(c['route']))}" for task, c in choices.items()]
    labels = [
        f"{task}\n{choice['similarity']:.3f} (training {choice['training_similarity']:.3f})"
        for task, choice in choices.items()
    ]
    with drawing(
        1.0 + 0.5 * len(choices), f"Routes with most votes. {'; '.join(winners)}."
    ) as canvas:
        axes = canvas.figure.subplots()
        draw_votes(axes, choices)
        axes.set_yticks(range(len(choices)), labels)
    caption = (
        "Every image of a task votes, by its cluster, for a route through the experts. Votes for a "
        "single route mean that the task is of one kind. Below its name: the similarity of the task's "
        "images to the centroids and, in brackets, that of the training images; a far lower one means "
        "that the task is unlike anything seen in training."
    )
    return html.chart(canvas.picture, caption, "Routes of the tasks")


def _verdict(run: Run) -> str:
    """What the estimate says; older runs and short ones say nothing."""
    if run.info.get("worthwhile") is None:
        return "Too few passes over the groups' images for a verdict."
    if run.info["worthwhile"]:
        return "Experts are likely to pay."
    return "Experts are unlikely to pay yet."


def headroom_section(run: Run) -> Section:
    rows = []
    for number, group in enumerate(run.info["groups"]):
        gain = f"{100 * group['gain']:+.1f} %"
        rows.append(
            [
                f"group {number}",
                f"{group['images']:,}",
                f"{group['error_all']:.4f}",
                f"{group['error_alone']:.4f}",
                f"{group['passes']:.1f}" if "passes" in group else "",
                html.strong(gain) if group.get("worthwhile") else gain,
            ]
        )
    columns = [
        "Group",
        "Images",
        "Error, trained on all",
        "Error, trained on the group",
        "Passes over the group",
        "Headroom",
    ]
    caption = (
        "Reconstruction error on held-out images; in bold where experts are likely to pay. "
        + _verdict(run)
    )
    lead = (
        "How much lower the error of a group's images is after training on the group alone: an upper "
        "bound of what an expert could gain."
    )
    blocks = [html.table(columns, rows, caption)]
    return Section(f"headroom-{run.anchor}", run.label, lead, blocks)
