"""Compact results: one JSON line per task, backbone and protocol, and per measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moce.evaluation import results
from moce.runs.files import write_text

KEPT = ("backbone", "task", "role", "protocol", "metric", "labels", "values", "seconds")
DIGITS = 6  # of values: accuracies on at most a few thousand images
KEY = ("study", "variant", "seed", "backbone", "task", "protocol", "measure", "where")


def evaluation_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a `moce evaluate` run, without confusion matrices."""
    revision = json.loads((folder / "evaluation.json").read_text())["git_revision"]
    return [_compact(row, revision) for row in results.read_rows(folder)]


def _compact(row: dict[str, Any], revision: str | None) -> dict[str, Any]:
    compact = {name: row[name] for name in KEPT} | {"revision": revision}
    compact["values"] = [round(value, DIGITS) for value in row["values"]]
    choice = row["choice"]
    if choice and "strategy" in choice:
        total = sum(choice["votes"].values())
        votes = {route: round(n / total, 4) for route, n in choice["votes"].items() if n}
        route = "-".join(map(str, choice["route"]))
        compact |= {"strategy": choice["strategy"], "route": route, "votes": votes}
        compact |= {"share": round(choice["share"], 4)}
        compact |= {"similarity": round(choice["similarity"], 4)}
    if choice and "routes" in choice:
        compact["routes"] = {route: round(v, 4) for route, v in choice["routes"].items()}
    return compact


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a results file; they replace rows that measured the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_key = {_key(row): row for row in [*read_rows(path), *rows]}
    write_text(path, "".join(json.dumps(row) + "\n" for row in by_key.values()))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)
