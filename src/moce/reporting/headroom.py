"""Section Headroom: what experts could gain on each group of clusters."""

from __future__ import annotations

from moce.reporting.elements import Cell, Row, Section, Table
from moce.reporting.load import Run


def headroom_section(run: Run) -> Section:
    rows: list[Row] = [
        [
            f"group {number}",
            f"{group['images']:,}",
            f"{group['error_all']:.4f}",
            f"{group['error_alone']:.4f}",
            Cell(f"{100 * group['gain']:+.1f} %", strong=bool(group.get("worthwhile"))),
        ]
        for number, group in enumerate(run.info["groups"])
    ]
    columns = [
        "Group",
        "Images",
        "Error, trained on all",
        "Error, trained on the group",
        "Headroom",
    ]
    caption = "Reconstruction error on held-out images; in bold where experts are likely to pay."
    lead = (
        "How much lower the error of a group's images is after training on the group alone: an upper "
        "bound of what an expert could gain."
    )
    return Section(f"headroom-{run.anchor}", run.label, lead, [Table(caption, columns, rows)])
