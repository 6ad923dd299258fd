"""Write the results of Mix-32 into docs/results.md: tables with intervals, and figures.

    python -m experiments.mix32.draw --results experiments/mix32/results/cpu.jsonl

Only what stands between the two marks of the results' name is rewritten; text around them stays. A
section whose rows are missing is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

from experiments.mix32.collect import read_rows
from experiments.mix32.stats import REGRET, Gain, Row, cells, compare, gain, spread, task_gains
from moce.errors import MoceError
from moce.reporting.style import INK, METHODS, SOFT, WIDTH, Look, drawing, readable_on
from moce.runs import write_text

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results.md"
PROTOCOLS = {"linear": "linear probe", "knn": "nearest neighbours", "finetune": "fine-tuned"}
# Which tasks a part of the pool is made for; a part that is not here is itself a task.
TASKS_OF = {
    "cifar10": ("cifar10", "animals", "vehicles"),
    "fashion_mnist": ("fashion", "shoes", "tops"),
    "mnist": ("digits", "coloured_digits"),
    "noto_emoji": ("twemoji", "apple_emoji", "facebook_emoji"),
    "animate": ("animals",),
    "inanimate": ("vehicles",),
    "glyphs": ("digits", "fashion", "twemoji"),
}
# Backbones in the order of tables; those not here follow by their own names.
LOOKS = {
    "mae": METHODS["mae"],
    "mae_plus": METHODS["mae_plus"],
    "token_moe": Look("token MoE", "#e69f00", "v"),
    "sdr": Look("SDR", "#56b4e9", "o"),
    "moce": METHODS["moce"],
    "moce_random": METHODS["random_route"],
    "moce_oracle": METHODS["oracle"],
    "subset": Look("subset", INK, "P"),
}
CONTRASTS = (
    ("moce", "mae_plus"),
    ("token_moe", "mae_plus"),
    ("sdr", "mae_plus"),
    ("subset", "mae_plus"),
    ("moce", "moce_random"),
    REGRET,
)
IN_FIGURE = ("moce", "token_moe", "sdr", "subset")
SKELETON = """# Results

What moce does on more images than the demo's. The tables are computed from rows kept in
`experiments/`, by the commands beside them. Differences are in points and paired: same task, same
seed, same draw of labels. MAE+ is the fair opponent: the MAE trained on for as many steps and
images. Whether a difference means anything is for its interval to say, and an interval that holds
zero says that none was shown.
"""
HEADING = "## Mix-32, recipe `{name}`"


@dataclass(frozen=True)
class Results:
    """All rows of one recipe. name: the recipe's; figures: folder that figures go to."""

    name: str
    rows: list[Row] = field(repr=False)
    figures: Path

    def of(self, study: str) -> list[Row]:
        """Accuracies of a study."""
        return [row for row in self.rows if row["study"] == study and "protocol" in row]

    def main(self) -> list[Row]:
        """Accuracies of the comparison, with all subsets together as one backbone."""
        return as_one_subset([row for row in self.of("main") if row["variant"] == "default"])

    def measures(self, measure: str) -> list[Row]:
        """Rows of a measure of the comparison."""
        main = [row for row in self.rows if row["study"] == "main" and row["variant"] == "default"]
        return [row for row in main if row.get("measure") == measure]

    @contextmanager
    def figure(self, kind: str, height: float, alt: str, width: float = WIDTH) -> Iterator[Figure]:
        """A figure in the project's style, saved when drawn."""
        self.figures.mkdir(parents=True, exist_ok=True)
        with drawing(height, alt, width) as canvas:
            yield canvas.figure
            canvas.figure.savefig(self.figures / self.file(kind), dpi=130, facecolor="white")

    def file(self, kind: str) -> str:
        return f"mix32_{self.name}_{kind}.png"

    def caption(self, study: str, rows: list[Row]) -> str:
        """Where a table's numbers come from."""
        seeds = {row["seed"] for row in rows}
        draws = {len(row["values"]) for row in rows if "values" in row}
        revisions = {str(row["revision"]) for row in self.of(study) if row["seed"] in seeds}
        parts = [f"Seeds {listed(seeds)}"]
        parts += [f"draws of labels: {listed(draws)}"] if draws else []
        command = f"experiments.mix32.run --recipe experiments/mix32/{self.name}.yaml"
        parts += [f"revision {listed(revisions) or 'unknown'}"]
        return f"{'; '.join(parts)}; `python -m {command} --studies {study}`."


# Names, numbers and tables as text


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(values)))


def title(backbone: str) -> str:
    return LOOKS[backbone].title if backbone in LOOKS else backbone.replace("_", " ")


def look(backbone: str) -> Look:
    return LOOKS.get(backbone, Look(title(backbone), SOFT, "o"))


def ordered(backbones: Iterable[str]) -> list[str]:
    known = list(LOOKS)
    return sorted(
        set(backbones), key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def present(rows: list[Row], name: str) -> list[Any]:
    """The values of a field, in the order of their first row."""
    return list(dict.fromkeys(row[name] for row in rows))


def protocols(rows: list[Row]) -> list[str]:
    found = present(rows, "protocol")
    return [name for name in PROTOCOLS if name in found]


def table(header: Collection[str], lines: Iterable[Collection[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def show_interval(found: Gain | None) -> str:
    """Nothing where it rests on a single value, which has no interval."""
    return f"[{found.low:+z.1f}, {found.high:+z.1f}]" if found and found.low < found.high else ""


def show_gain(found: Gain | None) -> str:
    return f"{found.mean:+z.1f} {show_interval(found)}".strip() if found else ""


def show_spread(values: Collection[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def tasks_of(part: str) -> tuple[str, ...]:
    return TASKS_OF.get(part, (part,))


def as_one_subset(rows: list[Row]) -> list[Row]:
    """The rows, those of `subset_X` as of one backbone `subset` and on the tasks of X only."""
    kept = []
    for row in rows:
        name, _, part = row["backbone"].partition("_")
        if name != "subset":
            kept.append(row)
        elif row["task"] in tasks_of(part):
            kept.append(row | {"backbone": "subset"})
    return kept


# The comparison


def headline(results: Results) -> Iterator[str]:
    """Gains in the mean over tasks, and regret."""
    rows = results.main()
    held_out = {row["task"] for row in rows if row["role"] == "held_out"}
    lines = []
    for protocol in protocols(rows):
        for pair in CONTRASTS:
            meant = tasks_meant_for(pair[0], rows)
            of_held_out, of_all = (
                [gain(rows, *pair, protocol, tasks, fixed) for fixed in (False, True)]
                for tasks in (meant & held_out, meant)
            )
            if of_all[0]:
                lines.append(
                    [*named(pair, protocol), *headline_cells(of_held_out, of_all[0], of_all[1])]
                )
    if not lines:
        return
    yield "### Gains in points"
    yield (
        "Mean over tasks, with 95 % intervals by a bootstrap over tasks, seeds and draws of labels: "
        "the tasks as a sample of such tasks. *Fixed* resamples seeds and draws only: for just "
        "these tasks. With few seeds both are too narrow. Defaults may be tuned on the development "
        "tasks, so it is the held-out ones that count. A *subset* (MAE+ on the images like one "
        "task's, scored on that task and its kin) exists for some tasks only, so its mean is over "
        "fewer than the others'. *Tasks*: held-out, all. *Unpaired* values, of all tasks, had no "
        "partner and are left out."
    )
    header = ["difference", "protocol", "held-out", "fixed", "all tasks", "fixed"]
    yield table([*header, "tasks", "seeds", "draws", "unpaired"], lines)
    yield results.caption("main", rows)


def tasks_meant_for(backbone: str, rows: list[Row]) -> set[str]:
    """All tasks, but of subsets those that have one: the others are not missing there."""
    own = {row["task"] for row in rows if row["backbone"] == backbone}
    return own if backbone == "subset" else set(present(rows, "task"))


def named(pair: tuple[str, str], protocol: str) -> list[str]:
    name = f"{title(pair[0])} − {title(pair[1])}" + (" (regret)" if pair == REGRET else "")
    return [name, PROTOCOLS[protocol]]


def headline_cells(held_out: list[Gain | None], drawn: Gain, fixed: Gain | None) -> list[str]:
    """held_out: the gain with tasks drawn and with tasks fixed; drawn, fixed: those of all tasks."""
    gains = [show_gain(held_out[0]), show_interval(held_out[1])]
    gains += [show_gain(drawn), show_interval(fixed)]
    tasks = f"{held_out[0].tasks if held_out[0] else 0}, {drawn.tasks}"
    return [*gains, tasks, *map(str, (drawn.seeds, drawn.draws, drawn.unpaired))]


def per_task(results: Results) -> Iterator[str]:
    """Every backbone on every task; gains over MAE+ as a figure."""
    rows = results.main()
    for protocol in protocols(rows):
        yield f"### Every task, {PROTOCOLS[protocol]}"
        yield "Metric in %, mean ± standard deviation over seeds of the means over draws of labels."
        of_protocol = [row for row in rows if row["protocol"] == protocol]
        yield task_table(of_protocol, protocol)
        yield results.caption("main", of_protocol)
        if any(task_gains(rows, name, "mae_plus", protocol, tasks_in(rows)) for name in IN_FIGURE):
            yield draw_gains(results, rows, protocol)


def tasks_in(rows: list[Row]) -> list[str]:
    """Development tasks first."""
    roles = {row["task"]: row["role"] for row in rows}
    return sorted(roles, key=lambda task: roles[task] != "development")


def seed_means(rows: list[Row], backbone: str, protocol: str, task: str) -> list[float]:
    """The metric in %, one value per seed."""
    found = cells(rows, backbone, protocol)
    return [100 * float(np.mean(values)) for cell, values in found.items() if cell[0] == task]


def task_table(rows: list[Row], protocol: str) -> str:
    tasks, backbones = tasks_in(rows), ordered(present(rows, "backbone"))
    roles = {row["task"]: row["role"].replace("_", "-") for row in rows}
    gains = task_gains(rows, "moce", "mae_plus", protocol, tasks)
    means = {b: {t: seed_means(rows, b, protocol, t) for t in tasks} for b in backbones}
    lines = []
    for task in tasks:
        shown = [show_spread(means[backbone][task]) for backbone in backbones]
        lines.append([task, roles[task], *shown, show_gain(gains.get(task))])
    full = {b: all(means[b].values()) for b in backbones}  # a mean over fewer would mislead
    averages = {b: np.mean([np.mean(v) for v in means[b].values()]) for b in backbones if full[b]}
    last = [f"**{averages[b]:.1f}**" if b in averages else "" for b in backbones]
    names = [title(backbone) for backbone in backbones]
    return table(["task", "role", *names, "MoCE − MAE+"], [*lines, ["**mean**", "", *last, ""]])


def draw_gains(results: Results, rows: list[Row], protocol: str) -> str:
    """A dot and an interval per task and method."""
    tasks = tasks_in(rows)
    alt = f"Gain over MAE+ on every task, {PROTOCOLS[protocol]}"
    kind = f"gains_{protocol}"
    with results.figure(kind, 0.42 * len(tasks) + 1.1, alt) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1)
        for place, method in enumerate(IN_FIGURE):
            gains = task_gains(rows, method, "mae_plus", protocol, tasks)
            heights = [tasks.index(task) + 0.18 * (place - 1.5) for task in gains]
            points = np.array([[g.mean, g.mean - g.low, g.high - g.mean] for g in gains.values()])
            if len(points):
                axes.errorbar(
                    points[:, 0],
                    heights,
                    xerr=np.maximum(points[:, 1:].T, 0),  # skewed draws may leave the mean outside
                    fmt=look(method).marker,
                    color=look(method).colour,
                    label=look(method).title,
                    linewidth=1.4,
                    markersize=5,
                )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        axes.set_xlabel(
            f"points over MAE+, {PROTOCOLS[protocol]}; lines: 95 % over seeds and draws"
        )
        figure.legend(loc="outside upper left", ncols=len(IN_FIGURE))
    return image(results, kind, alt)


def image(results: Results, kind: str, alt: str) -> str:
    return f"![{alt}]({results.figures.name}/{results.file(kind)})"


def votes(results: Results) -> Iterator[str]:
    """Which routes the tasks' images vote for, in the first seed that tells."""
    voting = results.measures("votes")
    found = {(row["seed"], row["where"]): row["value"] for row in voting}
    rows = [row for row in results.main() if row["backbone"] == "moce" and "votes" in row]
    found |= {(row["seed"], row["task"]): row["votes"] for row in rows}
    if not found:
        return
    seed = min(seed for seed, _ in found)
    shares = {task: value for (of, task), value in found.items() if of == seed}
    routes = sorted({route for value in shares.values() for route in value})
    alt = f"Share of every task's images by the route they vote for, seed {seed}"
    with results.figure("votes", 0.34 * len(shares) + 1.2, alt) as figure:
        values = np.array(
            [[value.get(route, np.nan) for route in routes] for value in shares.values()]
        )
        axes = heat(figure, 100 * values, list(shares), routes, "Blues", (0, 100), ".0f")
        axes.set_xlabel("route: an expert in each MoE block; % of the task's images")
    yield "### Routes"
    yield f"{alt}. Routes of other seeds have other meanings."
    yield results.caption("main", [row for row in [*voting, *rows] if row["seed"] == seed])
    yield image(results, "votes", alt)


def heat(
    figure: Figure,
    values: np.ndarray,
    rows: list[str],
    columns: list[str],
    colours: str,
    limits: tuple[float, float],
    form: str,
) -> Axes:
    """A heat map with its numbers, [rows, columns]; NaN stays blank."""
    axes = figure.add_subplot()
    palette, scale = matplotlib.colormaps[colours], Normalize(*limits)
    axes.imshow(values, cmap=palette, norm=scale, aspect="auto")
    axes.grid(False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = readable_on(to_hex(palette(scale(value))))
            text = format(value, form)
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5)
    return axes


# The map of negative transfer


def transfer_map(results: Results) -> Iterator[str]:
    """Gain of training on one part of the images over training on all, for that part's tasks."""
    rows = results.of("map")
    names = sorted(name for name in present(rows, "backbone") if name.startswith("only_"))
    parts = [name.removeprefix("only_") for name in names]
    variants = sorted(present(rows, "variant"), key=by_number)
    for protocol in protocols(rows):
        gains = {
            (part, variant): gain(
                [row for row in rows if row["variant"] == variant],
                *(f"only_{part}", "mae_plus", protocol, tasks_of(part), True),
            )
            for part in parts
            for variant in variants
        }
        if any(gains.values()):
            yield f"### The map of negative transfer, {PROTOCOLS[protocol]}"
            yield (
                "The MAE trained on with one part of the images, less the MAE trained on with all "
                "for as many steps, on the part's own tasks: positive where the other images do "
                "harm. Points with 95 % intervals over seeds and draws, tasks fixed."
            )
            lines = [
                [part, ", ".join(tasks_of(part)), *(show_gain(gains[part, v]) for v in variants)]
                for part in parts
            ]
            yield table(["part", "tasks", *variants], lines)
            yield results.caption("map", [row for row in rows if row["protocol"] == protocol])
            yield draw_map(results, gains, parts, variants, protocol)


def by_number(variant: str) -> list[tuple[str, float, str]]:
    """A key that sorts a=8,b=2 by name and then by number, texts behind numbers."""
    pairs = [setting.partition("=")[::2] for setting in variant.split(",")]
    return [(name, as_number(value), value) for name, value in pairs]


def as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def draw_map(
    results: Results,
    gains: dict[tuple[str, str], Gain | None],
    parts: list[str],
    variants: list[str],
    protocol: str,
) -> str:
    found = [[gains[part, variant] for variant in variants] for part in parts]
    values = np.array([[cell.mean if cell else np.nan for cell in line] for line in found])
    most = max(1.0, float(np.nanmax(abs(values))))
    alt = f"Gain in points of training on a part of the images only, {PROTOCOLS[protocol]}"
    kind = f"map_{protocol}"
    with results.figure(kind, 0.42 * len(parts) + 1.2, alt) as figure:
        columns = [variant.replace(",", "\n") for variant in variants]
        axes = heat(figure, values, parts, columns, "RdBu", (-most, most), "+z.1f")
        axes.set_title("Points gained by training on one part only")
    return image(results, kind, alt)


# Ablations


def ablations(results: Results) -> Iterator[str]:
    """One factor changed at a time, less the default of the same seed."""
    main, changed = results.main(), results.of("ablation")
    tasks = {row["task"] for row in main if row["role"] == "development"}
    shown = protocols(changed)
    lines = []
    for variant in sorted(present(changed, "variant"), key=by_number):
        rows = [row for row in changed if row["variant"] == variant]
        gains = [
            compare(cells(rows, "moce", name), cells(main, "moce", name), tasks, True)
            for name in shown
        ]
        seeds = sorted({row["seed"] for row in rows})
        if any(gains):
            lines.append([variant, *map(show_gain, gains), listed(seeds)])
    if lines:
        yield "### Ablations"
        yield (
            "MoCE with one setting changed, less MoCE with the defaults: points in the mean over "
            "the development tasks, paired by seed and draw, with 95 % intervals over both."
        )
        yield table(["changed", *(PROTOCOLS[name] for name in shown), "seeds"], lines)
        yield results.caption("ablation", changed)


# Measures


def measures(results: Results) -> Iterator[str]:
    """Reconstruction, divergence and purity."""
    for measure, name, what in (
        ("reconstruction", "Reconstruction", "Error on held-out images of every domain"),
        ("divergence", "Divergence of the experts", "Of every MoE block, at the end of training"),
        ("purity", "Purity of the clusters", "Share of images of their cluster's main domain"),
    ):
        if rows := results.measures(measure):
            yield f"### {name}"
            yield f"{what}; mean ± standard deviation over seeds."
            yield measure_table(rows, measure)
            yield results.caption("main", rows)


def measure_table(rows: list[Row], measure: str) -> str:
    backbones = ordered(present(rows, "backbone"))
    lines = []
    for where in present(rows, "where"):
        of_place = [row for row in rows if row["where"] == where]
        values = [[r["value"] for r in of_place if r["backbone"] == b] for b in backbones]
        lines.append([str(where or "all"), *(show_spread(v, digits=3) for v in values)])
    place = "block" if measure == "divergence" else "images"
    return table([place, *map(title, backbones)], lines)


def cost(results: Results) -> Iterator[str]:
    """Time and size relative to MAE+ of the same seed."""
    seconds, sizes = ratios(results, "train_seconds"), ratios(results, "parameters")
    backbones = ordered(seconds.keys() | sizes.keys())
    if not backbones:
        return
    yield "### Cost"
    yield (
        "Relative to MAE+ of the same seed, mean ± standard deviation over seeds. Time is that of "
        "the run alone (a *subset* is needed once per kind of task) and rough where other work "
        "shared the machine; parameters are those of the stored run, all experts and the decoder "
        "included, not of the backbone handed to a task."
    )
    lines = [
        [title(b), show_spread(seconds.get(b, []), 2), show_spread(sizes.get(b, []), 2)]
        for b in backbones
    ]
    yield table(["backbone", "training time", "parameters"], lines)
    yield results.caption(
        "main", results.measures("train_seconds") + results.measures("parameters")
    )
    yield draw_cost(results, backbones, {"training time": seconds, "parameters": sizes})


def ratios(results: Results, measure: str) -> dict[str, list[float]]:
    """The measure over that of MAE+, a value per seed that has both."""
    rows = results.measures(measure)
    base = {row["seed"]: row["value"] for row in rows if row["backbone"] == "mae_plus"}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["seed"] in base:
            found.setdefault(row["backbone"], []).append(row["value"] / base[row["seed"]])
    return found


def draw_cost(
    results: Results, backbones: list[str], panels: dict[str, dict[str, list[float]]]
) -> str:
    alt = "Training time and parameters relative to MAE+"
    with results.figure("cost", 0.34 * len(backbones) + 0.9, alt) as figure:
        plots = figure.subplots(1, len(panels), sharey=True)
        for axes, (name, values) in zip(plots, panels.items(), strict=True):
            widths = [float(np.mean(values[b])) if b in values else 0 for b in backbones]
            places = range(len(backbones))
            axes.barh(places, widths, height=0.6, color=[look(b).colour for b in backbones])
            axes.axvline(1, color=INK, linewidth=1)
            axes.set_yticks(places, [title(b) for b in backbones])
            axes.set_title(f"{name}, MAE+ = 1")
        plots[0].invert_yaxis()
    return image(results, "cost", alt)


# The page


SECTIONS = (headline, per_task, votes, transfer_map, ablations, measures, cost)


def draw(results: Path, page: Path) -> None:
    """Rewrite the part of `page` that holds these results, and its figures. MoceError without rows."""
    rows = read_rows(results)
    if not rows:
        raise MoceError(f"{results} holds no results; run experiments.mix32.run first")
    found = Results(results.stem, rows, page.parent / "figures")
    command = f"experiments.mix32.draw --results experiments/mix32/results/{found.name}.jsonl"
    parts = [part for section in SECTIONS for part in section(found)]
    body = "\n\n".join([*parts, f"Drawn by `python -m {command}`."])
    text = page.read_text() if page.is_file() else SKELETON
    write_text(page, replaced(text, found.name, body))


def replaced(text: str, name: str, body: str) -> str:
    """The page with `body` between the marks of `name`, which are added at its end if missing."""
    begin, end = (f"<!-- mix32 {name} {side} -->" for side in ("begin", "end"))
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n{HEADING.format(name=name)}\n\n{begin}\n{end}\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise MoceError(f"the page needs both marks, '{begin}' before '{end}'; mend it by hand")
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    draw(given.results, given.page)
    print(given.page)


if __name__ == "__main__":
    main()
