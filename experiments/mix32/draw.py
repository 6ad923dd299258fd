"""Write the results of Mix-32 into docs/results.md: tables with intervals, and figures.

    python -m experiments.mix32.draw --results experiments/mix32/results/cpu.jsonl

Only the text between the two marks of the results' name is replaced. A section without rows is left
out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.mix32.collect import read_rows
from experiments.mix32.figures import Results
from experiments.mix32.tables import SECTIONS
from moce.errors import MoceError
from moce.runs.files import write_text

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results.md"
SKELETON = """# Results

What moce does on more images than the demo's. The tables are computed from rows kept in
`experiments/`, by the commands beside them. Differences are in points and paired: same task, same
seed, same draw of labels. MAE+ is the fair opponent: the MAE trained on for as many steps and
images. Whether a difference means anything is for its interval to say, and an interval that holds
zero says that none was shown.
"""
HEADING = "## Mix-32, recipe `{name}`"


def draw(results: Path, page: Path) -> None:
    """Rewrite these results in `page`, and their figures. Raises MoceError without rows."""
    rows = read_rows(results)
    if not rows:
        raise MoceError(f"{results} contains no results; run experiments.mix32.run first")
    name = results.stem
    found = Results(name, rows, page.parent / "figures")
    command = f"experiments.mix32.draw --results experiments/mix32/results/{name}.jsonl"
    parts = [part for section in SECTIONS for part in section(found)]
    body = "\n\n".join([*parts, f"Drawn by `python -m {command}`."])
    text = page.read_text() if page.is_file() else SKELETON
    write_text(page, replaced(text, f"mix32 {name}", HEADING.format(name=name), body))


def replaced(text: str, mark: str, heading: str, body: str) -> str:
    """The page with `body` between the marks; missing ones are added at its end, below a heading."""
    begin, end = (f"<!-- {mark} {side} -->" for side in ("begin", "end"))
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n{heading}\n\n{begin}\n{end}\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise MoceError(f"the page needs both marks, '{begin}' before '{end}'; fix it by hand")
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
