"""The sections of the Mix-32 page: Markdown tables with their captions.

A section yields its paragraphs, or nothing if its rows are missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np

from experiments.mix32.figures import (
    PROTOCOLS,
    Results,
    by_number,
    draw_cost,
    draw_gains,
    draw_map,
    draw_votes,
    listed,
    ordered,
    present,
    protocols,
    tasks_of,
    title,
)
from experiments.mix32.parts import FOREIGN
from experiments.mix32.stats import REGRET, Gain, Row, cells, compare, gain, spread, task_gains

CONTRASTS = (
    ("moce", "mae_plus"),
    ("moce_adapted", "mae_plus"),
    ("mae_plus_adapted", "mae_plus"),
    ("moce_adapted", "mae_plus_adapted"),
    ("mae_further", "mae_plus"),
    ("mae_plus_adapted", "mae_further"),
    ("moce_adapted", "mae_further"),
    ("moce_block", "mae_plus"),
    ("moce", "token_moe"),
    ("token_moe", "mae_plus"),
    ("sdr", "mae_plus"),
    ("subset", "mae_plus"),
    ("moce_probe", "mae_plus"),
    ("moce_route", "mae_plus"),
    ("moce_merge", "mae_plus"),
    ("moce_generalist", "mae_plus"),
    ("moce", "moce_random"),
    REGRET,
    ("moce_best", "moce"),
    ("moce_block_oracle", "moce_block"),
)
IN_FIGURE = ("moce", "moce_adapted", "mae_plus_adapted", "moce_block", "token_moe", "sdr", "subset")


# Numbers and tables as text


def table(header: Collection[str], lines: Iterable[Collection[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def show_interval(found: Gain | None) -> str:
    """The interval as text; empty for a single value."""
    return f"[{found.low:+z.1f}, {found.high:+z.1f}]" if found and found.low < found.high else ""


def show_gain(found: Gain | None) -> str:
    return f"{found.mean:+z.1f} {show_interval(found)}".strip() if found else ""


def show_spread(values: Collection[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def over_seeds(rows: list[Row]) -> str:
    """Describe what `show_spread` shows of these rows."""
    several = len({row["seed"] for row in rows}) > 1
    return "mean ± standard deviation over seeds" if several else "of a single seed"


def with_intervals(rows: list[Row]) -> str:
    """Describe what the intervals are over, with fixed tasks; empty if there are none."""
    levels = {"seeds": len({row["seed"] for row in rows})}
    levels["draws"] = max(len(row["values"]) for row in rows)
    over = " and ".join(name for name, number in levels.items() if number > 1)
    return f", with 95 % intervals over {over}" if over else ""


# The comparison


def headline(results: Results) -> Iterator[str]:
    """Mean gains over tasks, and regret."""
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
        "tasks, so it is the held-out ones that count. *Tasks*: held-out, all. *Unpaired* values, "
        "of all tasks, had no partner and are left out."
    )
    if any(row["backbone"] == "subset" for row in rows):
        yield (
            "A *subset* (MAE+ on the images like one task's, scored on that task and its kin) "
            "exists for some tasks only, so its mean is over fewer than the others'."
        )
    header = ["difference", "protocol", "held-out", "fixed", "all tasks", "fixed"]
    yield table([*header, "tasks", "seeds", "draws", "unpaired"], lines)
    yield results.caption("main", rows)


def by_source(results: Results) -> Iterator[str]:
    """Gains on tasks from sources that are in pre-training, and on the others."""
    rows = results.main()
    known = set(present(rows, "task")) - set(FOREIGN)
    lines = []
    for protocol in protocols(rows):
        for pair in CONTRASTS:
            if pair[0] == "subset":  # has tasks of two known sources only
                continue
            of_known, of_foreign = (
                gain(rows, *pair, protocol, tasks) for tasks in (known, FOREIGN)
            )
            if of_known and of_foreign:
                count = f"{of_known.tasks}, {of_foreign.tasks}"
                lines.append(
                    [*named(pair, protocol), show_gain(of_known), show_gain(of_foreign), count]
                )
    if lines:
        yield "### Known and foreign sources"
        yield (
            "The same, in the mean over tasks whose images are of sources that pre-training has "
            "images of, and over tasks of sources it has none of. Both hold development tasks."
        )
        yield table(["difference", "protocol", "known", "foreign", "tasks"], lines)
        yield results.caption("main", rows)


def tasks_meant_for(backbone: str, rows: list[Row]) -> set[str]:
    """All tasks; of a subset only those it exists for, so that the others do not count as missing."""
    own = {row["task"] for row in rows if row["backbone"] == backbone}
    return own if backbone == "subset" else set(present(rows, "task"))


def named(pair: tuple[str, str], protocol: str) -> list[str]:
    name = f"{title(pair[0])} − {title(pair[1])}" + (
        " (regret)" if pair[0].endswith(("_oracle", "_best")) else ""
    )
    return [name, PROTOCOLS[protocol]]


def headline_cells(held_out: list[Gain | None], drawn: Gain, fixed: Gain | None) -> list[str]:
    """held_out: the gain with tasks drawn and with tasks fixed; drawn, fixed: those of all tasks."""
    gains = [show_gain(held_out[0]), show_interval(held_out[1])]
    gains += [show_gain(drawn), show_interval(fixed)]
    tasks = f"{held_out[0].tasks if held_out[0] else 0}, {drawn.tasks}"
    return [*gains, tasks, *map(str, (drawn.seeds, drawn.draws, drawn.unpaired))]


def per_task(results: Results) -> Iterator[str]:
    """Every backbone on every task; gains over MAE+ as a figure."""
    main = results.main()
    for protocol in protocols(main):
        rows = [row for row in main if row["protocol"] == protocol]
        held_out = {row["role"] for row in rows} == {"held_out"}
        yield f"### Every {'held-out ' if held_out else ''}task, {PROTOCOLS[protocol]}"
        yield f"Metric in %, averaged over draws of labels; {over_seeds(rows)}."
        yield task_table(rows, protocol)
        yield results.caption("main", rows)
        tasks = tasks_in(rows)
        gains = {b: task_gains(rows, b, "mae_plus", protocol, tasks) for b in IN_FIGURE}
        if any(gains.values()):
            yield draw_gains(results, gains, tasks, protocol, with_intervals(rows))


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


def votes(results: Results) -> Iterator[str]:
    """Which routes the tasks' images vote for, in the first seed that has votes."""
    rows = [row for row in results.main() if row["backbone"] == "moce" and "votes" in row]
    if not rows:
        return
    seed = min(row["seed"] for row in rows)
    shares = {row["task"]: row["votes"] for row in rows if row["seed"] == seed}
    alt = f"Share of every task's images by the route they vote for, seed {seed}"
    yield "### Routes"
    yield f"{alt}. Routes of other seeds have other meanings."
    yield results.caption("main", [{"seed": seed}])  # votes need no labels
    yield draw_votes(results, shares, alt)


# The map of negative transfer


def transfer_map(results: Results) -> Iterator[str]:
    """Gain of training on one part of the images over training on all, for that part's tasks."""
    rows = results.of("map")
    names = sorted(name for name in present(rows, "backbone") if name.startswith("only_"))
    variants = sorted(present(rows, "variant"), key=by_number)
    for protocol in protocols(rows):
        gains = map_gains([row for row in rows if row["protocol"] == protocol], names, variants)
        if gains:
            of_protocol = [row for row in rows if row["protocol"] == protocol]
            yield f"### The map of negative transfer, {PROTOCOLS[protocol]}"
            yield (
                "The MAE trained on with one part of the images, less the MAE trained on with all "
                "for as many steps, on the part's own tasks: positive where the other images do "
                f"harm. Points{with_intervals(of_protocol)}."
            )
            lines = list(dict.fromkeys(line for line, _ in gains))
            yield table(
                ["task (trained on)", *variants],
                [[line, *(show_gain(gains[line, v]) for v in variants)] for line in lines],
            )
            yield results.caption("map", of_protocol)
            yield draw_map(results, gains, lines, variants, protocol)


def map_gains(
    rows: list[Row], backbones: list[str], variants: list[str]
) -> dict[tuple[str, str], Gain | None]:
    """The gain of every task of a part by training on the part, by line of the table and variant."""
    gains: dict[tuple[str, str], Gain | None] = {}
    for backbone in backbones:
        part = backbone.removeprefix("only_")
        for task in tasks_of(part):
            found = {
                variant: gain(
                    [row for row in rows if row["variant"] == variant],
                    *(backbone, "mae_plus", rows[0]["protocol"], (task,), True),
                )
                for variant in variants
            }
            if any(found.values()):
                gains |= {(f"{task} ({part})", variant): of for variant, of in found.items()}
    return gains


# Ablations


def ablations(results: Results) -> Iterator[str]:
    """Change one factor at a time; differences from the default of the same seed."""
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
            f"the development tasks, paired by seed and draw{with_intervals(changed)}."
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
            yield f"{what}; {over_seeds(rows)}."
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
    rows = results.measures("train_seconds") + results.measures("parameters")
    subsets = any(backbone.startswith("subset") for backbone in backbones)
    yield "### Cost"
    yield (
        f"Relative to MAE+ of the same seed; {over_seeds(rows)}. Time is that of the run alone"
        f"{' (a *subset* is needed once per kind of task)' if subsets else ''} and rough where "
        "other work shared the machine; parameters are those of the stored run, all experts and "
        "the decoder included, not of the backbone handed to a task."
    )
    lines = [
        [title(b), show_spread(seconds.get(b, []), 2), show_spread(sizes.get(b, []), 2)]
        for b in backbones
    ]
    yield table(["backbone", "training time", "parameters"], lines)
    yield results.caption("main", rows)
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


SECTIONS = (headline, by_source, per_task, votes, transfer_map, ablations, measures, cost)
