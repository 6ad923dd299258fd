"""The tables of docs/performance.md, from the numbers in results/: python -m benchmarks.draw"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks import clustering
from benchmarks.images import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MARK = "<!-- images -->"


def table(rows: list[dict], reference: str) -> list[str]:
    """Median rate and range of every contender, and how many times as fast as the reference."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        rates.setdefault(row["contender"], []).append(row["images_per_s"])
    base = median(rates[reference])
    lines = [f"| | images/s | range | × {reference} |", "|---|--:|--:|--:|"]
    for name, found in rates.items():
        spread = f"{min(found):,.0f} to {max(found):,.0f}" if len(found) > 1 else "one pass"
        lines.append(f"| {name} | {median(found):,.0f} | {spread} | {median(found) / base:.2f} |")
    return lines


def section(result: dict) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads, load "
        f"average {machine['load_average']:.1f} before the start; revision {machine['revision']}"
        + (" with changes" if machine["changed"] else "")
        + (
            ". **A short run on a busy machine, few passes: rough, to be taken again on an idle one.**"
            if result["short"]
            else "."
        ),
        ", ".join(f"{name} {number}" for name, number in machine["versions"].items()) + ".",
    ]
    for found in result["cases"].values():
        case, wait = found["case"], found["training"]
        height, width, suffix = case["file"]
        lines += [
            f"### {case['size']} × {case['size']}, from {case['images']} files of {width} × {height} "
            f"({suffix[1:]})",
            f"Decoded and resized to {case['packed']} × {case['packed']}:",
            "\n".join(table(found["rows"]["decode"], "torchvision, 2 workers")),
            f"Batches of {case['batch']}, cropped, flipped and normalised:",
            "\n".join(table(found["rows"]["loader"], "torchvision, 2 workers")),
            f"A small ViT that trains on the packed file waits {100 * wait['share']:.1f} % of a step "
            f"of {wait['step_s']:.2f} s for its batch.",
        ]
    return "\n\n".join(lines)


def main() -> None:
    before, _, after = PAGE.read_text().split(MARK)
    content = section(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{MARK}\n{content}\n{MARK}{after}")
    put("<!-- clustering -->", clustering.tables())


def put(mark: str, content: str) -> None:
    """Content between two marks of the page."""
    before, _, after = PAGE.read_text().split(mark)
    PAGE.write_text(f"{before}{mark}\n{content}\n{mark}{after}")


if __name__ == "__main__":
    main()
