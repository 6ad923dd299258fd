"""The tables of docs/performance.md, from the numbers in results/: python -m benchmarks.draw"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks import clustering
from benchmarks.candidates import AS_IT_COMES, SIZES
from benchmarks.checkpoints import RESULTS as CHECKPOINTS
from benchmarks.checkpoints import WAITS
from benchmarks.finetune_step import CHUNKS, WHOLE
from benchmarks.finetune_step import RESULTS as FINETUNE_STEP
from benchmarks.images import CASES, Case
from benchmarks.images import RESULTS as IMAGES
from benchmarks.mae_step import LIMIT
from benchmarks.mae_step import RESULTS as MAE_STEP
from benchmarks.moce_step import DENSE
from benchmarks.moce_step import RESULTS as MOCE_STEP
from benchmarks.probe import OURS, WIDTH
from benchmarks.probe import RESULTS as PROBE
from benchmarks.scaling import RESULTS as SCALING
from benchmarks.scaling import exponent
from benchmarks.selection import BARE, BRUTE, SELECT
from benchmarks.selection import RESULTS as SELECTION
from benchmarks.startup import BARE as BARE_PYTHON
from benchmarks.startup import CUSTOMIZE, PASS
from benchmarks.startup import RESULTS as STARTUP
from benchmarks.tables import conditions, grouped, markdown, ratio, spread

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def images(result: dict) -> str:
    """Rates of every loader; what training waits; the first step."""
    lines = []
    for name, part in result["parts"].items():
        if name in CASES:
            lines += [f"### {described(CASES[name])}", conditions(part), rates(part["rows"])]
        elif name == "waiting":
            share = sum(row["seconds"] for row in part["rows"]) / sum(
                r["step"] for r in part["rows"]
            )
            step = median(row["step"] for row in part["rows"])
            lines += [
                "### Waiting",
                conditions(part),
                f"A ViT-S that trains on files of 500 × 400 in batches waits {100 * share:.2f} % of the "
                f"time for them; a step takes {step:.2f} s.",
            ]
        else:
            group = grouped(part["rows"])[()]
            few, many = group
            table = [[label, f"{median(found):.1f}"] for label, found in group.items()]
            later = median(group[many]) - median(group[few])
            lines += [
                "### First step",
                conditions(part),
                markdown(["a process, until its first step is made", "seconds"], table),
                f"The first step comes {later:.1f} s later on {many} than on {few}.",
            ]
    return "\n\n".join(lines)


def described(case: Case) -> str:
    height, width, suffix = case.file
    return f"{case.size} × {case.size}, from files of {width} × {height} ({suffix[1:]})"


def rates(rows: list[dict]) -> str:
    """Median rate and range of every loader, and how many times as fast moce is in the same turn."""
    group = grouped(rows)[()]
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["candidate"], []).append(row["images_per_s"])
    lines = [
        [
            name,
            f"{median(each):,.0f}",
            f"{min(each):,.0f} to {max(each):,.0f}",
            "" if name == "moce" else f"{ratio(group, name, 'moce'):.2f}",
        ]
        for name, each in found.items()
    ]
    return markdown(["two workers", "images/s", "range", "moce is faster by"], lines)


def mae_step(result: dict) -> str:
    """Speed of every size, then memory of all."""
    parts = dict(result["parts"])
    memory = [parts.pop(name) for name in list(parts) if name.startswith("memory")]
    lines = [piece for name, part in parts.items() for piece in mae_speed(name, part)]
    return "\n\n".join([*lines, *(piece for part in memory for piece in mae_memory(part))])


def mae_speed(name: str, part: dict) -> list[str]:
    cases = grouped(part["rows"], "batch", "threads")
    first = next(iter(cases.values()))
    head = [f"images/s ({part['rows'][0]['precision']})"]
    head += [f"batch {batch}, {threads} threads" for batch, threads in cases]
    lines = [
        [name, *(f"{batch / median(group[name]):.1f}" for (batch, _), group in cases.items())]
        for name in first
    ]
    theirs = [other for other in first if other.startswith("Transformers")]
    best = [min(ratio(group, other, "moce") for other in theirs) for group in cases.values()]
    lines += [
        [
            f"moce × {AS_IT_COMES}",
            *(f"{ratio(g, AS_IT_COMES, 'moce'):.2f}" for g in cases.values()),
        ],
        ["moce × the best of Transformers", *(f"{value:.2f}" for value in best)],
        ["moce, share of the limit", *(f"{ratio(g, LIMIT, 'moce'):.0%}" for g in cases.values())],
        ["moce, half the range of turns", *(f"± {spread(g['moce']):.0%}" for g in cases.values())],
    ]
    return [f"### {title(name)}", conditions(part), markdown(head, lines)]


def title(part: str) -> str:
    """What a part measures: its size in words."""
    size = next(
        SIZES[name] for name in sorted(SIZES, key=len, reverse=True) if part.startswith(name)
    )
    decoder = " × ".join(map(str, size.decoder[:2]))
    return (
        f"{part}: {size.width} wide, {size.depth} blocks, {size.image} × {size.image} in patches of "
        f"{size.patch}; decoder {decoder}"
    )


def mae_memory(part: dict) -> list[str]:
    peaks: dict[tuple[str, int], dict[str, int]] = {}
    for row in part["rows"]:
        peaks.setdefault((row["size"], row["batch"]), {})[row["candidate"]] = row["peak_mb"]
    names = list(next(iter(peaks.values())))
    lines = [[name, *(f"{found[name]:,}" for found in peaks.values())] for name in names]
    share = [found["moce"] / found[AS_IT_COMES] for found in peaks.values()]
    lines.append([f"moce / {AS_IT_COMES}", *(f"{value:.2f}" for value in share)])
    head = ["peak MB", *(f"{size}, batch {batch}" for size, batch in peaks)]
    heading = f"### Peak memory of training: {', '.join(size for size, _ in peaks)}"
    return [heading, conditions(part), markdown(head, lines)]


def finetune_step(result: dict) -> str:
    """Speed of both ways, and how many times as fast chunks are in the same turn."""
    lines = []
    for name, part in result["parts"].items():
        cases = grouped(part["rows"], "batch", "threads")
        head = ["images/s", *(f"batch {batch}, {threads} threads" for batch, threads in cases)]
        rows = [
            [way, *(f"{batch / median(group[way]):.1f}" for (batch, _), group in cases.items())]
            for way in (WHOLE, CHUNKS)
        ]
        rows += [
            ["times as fast", *(f"{ratio(g, WHOLE, CHUNKS):.2f}" for g in cases.values())],
            ["half the range of turns", *(f"± {spread(g[CHUNKS]):.0%}" for g in cases.values())],
        ]
        lines += [f"### {name}", conditions(part), markdown(head, rows)]
    return "\n\n".join(lines)


def moce_step(result: dict) -> str:
    """Training of every size, then encoding by a customized expert."""
    parts = dict(result["parts"])
    encoding = parts.pop("encoding", None)
    lines = [piece for name, part in parts.items() for piece in over_dense(title(name), part)]
    return "\n\n".join(lines + (over_dense("Encoding", encoding) if encoding else []))


def over_dense(heading: str, part: dict) -> list[str]:
    """Every candidate's time over the dense model's, by size and batch."""
    cases = grouped(part["rows"], "size", "batch")
    names = [name for name in next(iter(cases.values())) if name != DENSE]
    lines = [
        [f"{DENSE}, ms", *(f"{1000 * median(g[DENSE]):.0f}" for g in cases.values())],
        [f"{DENSE}, half the range", *(f"± {spread(g[DENSE]):.0%}" for g in cases.values())],
        *([name, *(f"{ratio(g, name, DENSE):.3f}" for g in cases.values())] for name in names),
    ]
    head = ["time over the dense one's", *(f"{size}, batch {batch}" for size, batch in cases)]
    return [f"### {heading}", conditions(part), markdown(head, lines)]


def selection(result: dict) -> str:
    lines = []
    for name, part in result["parts"].items():
        cases = grouped(part["rows"], "images", "routes", "threads")
        head = ["", *(f"{n} images, {r} routes, {t} threads" for n, r, t in cases)]
        rows = [
            [f"{BARE}, s", *(f"{median(group[BARE]):.3f}" for group in cases.values())],
            *([f"{other}, times as long", *(f"{ratio(g, other, BARE):.2f}" for g in cases.values())]
              for other in (SELECT, BRUTE)),
        ]  # fmt: skip
        lines += [f"### {title(name)}", conditions(part), markdown(head, rows)]
    return "\n\n".join(lines)


def probe(result: dict) -> str:
    lines = []
    for part in result["parts"].values():
        for key, group in grouped(part["rows"], "images", "classes", "choose", "threads").items():
            images, classes, choose, threads = key
            best = min(median(found) for name, found in group.items() if name != OURS)
            accuracy = {
                row["candidate"]: row["accuracy"]
                for row in part["rows"]
                if (row["images"], row["classes"], row["choose"]) == (images, classes, choose)
            }
            rows = [
                [
                    name,
                    f"{median(found):.2f}",
                    f"{min(found):.2f} to {max(found):.2f}",
                    f"{median(found) / best:.2f}",
                    f"{100 * accuracy[name]:.1f}",
                ]
                for name, found in group.items()
            ]
            what = "a whole probe" if choose else "one fit"
            head = [what, "seconds", "range", "× the best of the others", "accuracy, %"]
            title = f"### {images:,} × {WIDTH}, {classes:,} classes, {threads} threads"
            lines += [title, conditions(part), markdown(head, rows)]
    return "\n\n".join(lines)


def startup(result: dict) -> str:
    lines = []
    for part in result["parts"].values():
        group = grouped(part["rows"])[()]
        base = median(group[BARE_PYTHON])
        rows = [
            [name, f"{median(found):.2f}", f"{median(found) - base:.2f}"]
            for name, found in group.items()
        ]
        lines += [conditions(part), markdown(["", "seconds", "beyond bare Python"], rows)]
        if CUSTOMIZE in group:
            times = ratio(group, CUSTOMIZE, PASS)
            lines.append(
                f"`moce customize` takes {times:.2f} times as long as the imports and the pass."
            )
    return "\n\n".join(lines)


def checkpoints(result: dict) -> str:
    lines = []
    for name, part in result["parts"].items():
        group = grouped(part["rows"])[()]
        rows = [
            [other, f"{median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
            for other, found in group.items()
        ]
        apart = median(group[WAITS]) / 0.05
        lines += [
            f"### {name}, {part['rows'][0]['mb']:,.0f} MB",
            conditions(part),
            markdown(["", "seconds", "range"], rows),
            f"Training waits less than 5 % of the time if checkpoints are {apart:.0f} s apart or more.",
        ]
    return "\n\n".join(lines)


def scaling(result: dict) -> str:
    """A line per part: seconds and memory at every size, and their exponents."""
    parts = result["parts"]
    sizes = sorted({row["images"] for part in parts.values() for row in part["rows"]})
    lines = []
    for name, part in parts.items():
        for key, unit, digits in (("seconds", "s", 2), ("peak_mb", "MB", 0)):
            found = {row["images"]: row[key] for row in part["rows"]}
            cells = [f"{found[size]:,.{digits}f}" if size in found else "" for size in sizes]
            lines.append([f"{name}, {unit}", *cells, f"{exponent(part['rows'], key):.2f}"])
    head = ["", *(f"{size:,} images" for size in sizes), "exponent"]
    return "\n\n".join([conditions(next(iter(parts.values()))), markdown(head, lines)])


SECTIONS: dict[str, tuple[Path, Callable[[dict], str]]] = {
    "images": (IMAGES, images),
    "mae_step": (MAE_STEP, mae_step),
    "finetune_step": (FINETUNE_STEP, finetune_step),
    "moce_step": (MOCE_STEP, moce_step),
    "selection": (SELECTION, selection),
    "probe": (PROBE, probe),
    "startup": (STARTUP, startup),
    "checkpoints": (CHECKPOINTS, checkpoints),
    "scaling": (SCALING, scaling),
    "clustering": (clustering.RESULTS, clustering.tables),
}


def drawn(page: str) -> str:
    """The page with what lies between two marks of a section's name drawn from its kept numbers."""
    for name, (results, draw) in SECTIONS.items():
        before, _, after = page.split(f"<!-- {name} -->")
        content = (
            draw(json.loads(results.read_text())) if results.is_file() else "Not measured yet."
        )
        page = f"{before}<!-- {name} -->\n{content}\n<!-- {name} -->{after}"
    return page


def main() -> None:
    PAGE.write_text(drawn(PAGE.read_text()))


if __name__ == "__main__":
    main()
