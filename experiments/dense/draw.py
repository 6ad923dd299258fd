"""Write the results on dense tasks into docs/results.md: tables with intervals.

python -m experiments.dense.draw
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.dense.compare import PROTOCOLS, RESULTS
from experiments.mix32.collect import read_rows
from experiments.mix32.draw import PAGE, replaced
from experiments.mix32.figures import ordered, present, title
from experiments.mix32.stats import Row, gain
from experiments.mix32.tables import over_seeds, show_gain, show_spread, table
from moce.errors import MoceError
from moce.runs.files import write_text

HEADING = "## Dense tasks"
TITLES = {
    "linear": "a linear layer on frozen tokens",
    "boxes": "linear layers on frozen tokens",
    "upernet": "fine-tuned with UPerNet",
    "detect": "fine-tuned with Mask R-CNN",
}
METRICS = {"miou": "mIoU", "box_ap": "box AP"}
OPPONENT = "mae_plus"
INTRODUCTION = """Backbones of Mix-32, recipe `cpu_adapted`, on dense tasks of 64 x 64 pixels. *kinds*:
digits and clothes pasted on photographs (background and two classes; 400 images to train, 200 to test).
*digits*: handwritten ones on photographs (400 and 200). *emoji*: a drawing on a photograph (background
and its nine categories; 800 and 200). *nuclei*: cells in the halves of a micrograph, of which pre-
training has seen nothing (background and nucleus; 8 tiles of 128 pixels each).
[SOURCES.md](../experiments/dense/SOURCES.md) names where they come from. Adapted: 200 steps on the task
and on related images. Frozen: one linear layer on the tokens of all blocks, three draws of 200 training
images. Box AP, frozen: linear layers tell tokens in the middle of an object, of whatever class, from the
background, and the sides of its box; COCO's metric. UPerNet: the whole network, 200 steps. These are
small networks and tasks: what they show holds for them."""


def draw(results: Path, page: Path) -> None:
    """Rewrite the section in `page`. Raises MoceError without rows."""
    rows = read_rows(results)
    if not rows:
        raise MoceError(f"{results} contains no results; run experiments.dense.compare first")
    parts = [INTRODUCTION, *(part for name in PROTOCOLS for part in section(rows, name))]
    parts.append("Drawn by `python -m experiments.dense.draw`.")
    text = replaced(page.read_text(), "dense", HEADING, "\n\n".join(parts))
    write_text(page, text)


def section(every: list[Row], protocol: str) -> Iterator[str]:
    """Scores, and gains over MAE+, of one protocol."""
    rows = [row for row in every if row["protocol"] == protocol]
    if not rows:
        return
    tasks, backbones = present(rows, "task"), ordered(present(rows, "backbone"))
    metric = METRICS[rows[0]["metric"]]
    yield f"### {metric}, {TITLES[protocol]}"
    yield f"In percent, {over_seeds(rows)} (of the mean over draws)."
    lines = [[title(name), *(score(rows, name, task) for task in tasks)] for name in backbones]
    yield table(["backbone", *tasks], lines)
    sets = [*([task] for task in tasks), tasks]
    gains = [
        [
            title(name),
            *(gain_over(rows, name, protocol, chosen) for chosen in sets),
            str(len(seeds_of(rows, name))),
        ]
        for name in backbones
        if name != OPPONENT
    ]
    yield (
        f"Gain over {title(OPPONENT)} in points, paired by seed and draw, with 95 % bootstrap "
        "intervals over both, for these tasks. Three seeds make them too narrow; one that holds zero "
        "shows no difference."
    )
    yield table(["backbone", *tasks, "mean", "seeds"], gains)
    revisions = ", ".join(sorted(set(filter(None, present(rows, "revision")))))
    seeds = ", ".join(map(str, sorted(present(rows, "seed"))))
    command = f"python -m experiments.dense.compare --protocols {protocol}"
    yield f"Seeds {seeds}; revision {revisions}; `{command}`."


def score(rows: list[Row], backbone: str, task: str) -> str:
    own = [row for row in rows if (row["backbone"], row["task"]) == (backbone, task)]
    return show_spread([100 * sum(row["values"]) / len(row["values"]) for row in own])


def gain_over(rows: list[Row], backbone: str, protocol: str, tasks: list[str]) -> str:
    return show_gain(gain(rows, backbone, OPPONENT, protocol, tasks, fixed_tasks=True))


def seeds_of(rows: list[Row], backbone: str) -> set[Any]:
    return {row["seed"] for row in rows if row["backbone"] == backbone}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    draw(given.results, given.page)
    print(given.page)


if __name__ == "__main__":
    main()
