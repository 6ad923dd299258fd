"""Section Detection and segmentation: AP and IoU, of every class too, and examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from moce.dense.examples import EXAMPLES
from moce.reporting.elements import Section, html
from moce.reporting.images import data_uri
from moce.reporting.load import Material

TITLES = {
    "detect": "Detection",
    "segment": "Segmentation",
    "segment_linear": "Segmentation, a linear layer on frozen features",
}
# The figures to show, in this order; COCO has more of them, which are in rows.jsonl.
FIGURES = {
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "box_ap75": "box AP75",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "mask_ap75": "mask AP75",
    "miou": "mIoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
}
BY_CLASS = {"box_ap/": "box AP", "mask_ap/": "mask AP", "iou/": "IoU"}
MOST_EXAMPLES = 4  # pictures per task


def dense_section(material: Material) -> Section | None:
    """The section; None without results of such tasks."""
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], Path]]] = {}
    for run in material.runs:
        for row in run.rows:
            if row.get("figures"):
                group = groups.setdefault((row["task"], _kind(row)), [])
                group.append((row, run.path / row.get("examples", EXAMPLES)))
    blocks = [block for key, group in groups.items() for block in _blocks(*key, group)]
    lead = (
        "COCO's average precision over the test images, or intersection over union of the classes of "
        "their pixels. Examples: truth on the left, prediction on the right."
    )
    return Section("dense", "Detection and segmentation", lead, blocks) if blocks else None


def _kind(row: dict[str, Any]) -> str:
    """The protocol as `moce evaluate` names it; `moce finetune` writes finetune for all tasks."""
    if row["protocol"] in TITLES:
        return row["protocol"]
    return "segment" if row["metric"] == "miou" else "detect"


def _blocks(task: str, kind: str, group: list[tuple[dict[str, Any], Path]]) -> list[Markup]:
    """Both tables of a task, and examples of each backbone."""
    rows = [row for row, _ in group]
    columns = [f"{TITLES[kind]}: {task}", *(row["backbone"] for row in rows)]
    shown = [[title, *_cells(rows, name)] for name, title in FIGURES.items()]
    blocks = [html.table(columns, _measured(shown), "In %.")]
    by_class = [
        [f"{title}, {name.removeprefix(prefix)}", *_cells(rows, name)]
        for prefix, title in BY_CLASS.items()
        for name in rows[0]["figures"]
        if name.startswith(prefix)
    ]
    blocks.append(html.table(columns, by_class, f"{task}: every class, in %", folded=True))
    pictures = [
        (row["backbone"], f"{row['labels']} training images", _picture(path, row["backbone"]))
        for row, path in group[:MOST_EXAMPLES]
        if path.is_file()
    ]
    return [*blocks, html.gallery(pictures, f"Examples: {task}")] if pictures else blocks


def _cells(rows: list[dict[str, Any]], name: str) -> list[str]:
    values = [row["figures"].get(name) for row in rows]
    return ["" if value is None else f"{100 * value:.1f}" for value in values]


def _measured(rows: Iterable[list[str]]) -> list[list[str]]:
    return [row for row in rows if any(row[1:])]


def _picture(path: Path, backbone: str) -> Markup:
    with Image.open(path) as image:
        width, height = image.size
    alt = f"Test images with truth and prediction of {backbone}"
    return html.picture(data_uri("image/png", path.read_bytes()), alt, width // 2, height // 2)
