"""Tables in Markdown of rows that `measure.in_turns` made: medians, and ratios within each turn."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from benchmarks.measure import Row

Group = dict[str, list[float]]  # the seconds of every candidate, turn by turn


def grouped(rows: list[Row], *keys: str) -> dict[tuple, Group]:
    """Seconds by the values of `keys`, then by candidate."""
    found: dict[tuple, Group] = {}
    for row in rows:
        group = found.setdefault(tuple(row[key] for key in keys), {})
        group.setdefault(row["candidate"], []).append(row["seconds"])
    return found


def ratio(group: Group, above: str, below: str) -> float:
    """The median over turns of the one's seconds over the other's."""
    pairs = zip(group[above], group[below], strict=False)  # slow candidates have fewer turns
    return median(one / other for one, other in pairs)


def spread(seconds: list[float]) -> float:
    """Half the range over the median: how far a number can be trusted."""
    return (max(seconds) - min(seconds)) / 2 / median(seconds)


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = list(head)
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def conditions(part: dict) -> str:
    """The machine and the versions of one part's rows, in a paragraph."""
    machine = part["machine"]
    where = (
        machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['instructions']}"
    )
    return (
        f"{where}; load average {machine['load_average']:.1f}; revision {machine['revision']}"
        + (" with changes" if machine["changed"] else "")
        + "; "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        + (". **A short run: rough.**" if part["short"] else ".")
    )
