"""Section Summary: the runs, their settings and their key metrics."""

from __future__ import annotations

from typing import Any

from moce.reporting.elements import Block, Cell, Row, Section, Table, Tiles
from moce.reporting.load import TITLES, Material, Run
from moce.reporting.results import PROTOCOLS
from moce.reporting.style import METHODS

NAMES = {
    "rounds": "iterations",  # moce 0.1.0
    "smallest": "smallest cluster",
    "largest": "largest cluster",
    "marginal_error": "largest error of a cluster's mass",
}


def summary_section(material: Material) -> Section:
    blocks: list[Block] = []
    tiles = _tiles(material)
    if tiles:
        blocks.append(Tiles(tiles))
    blocks += [_runs_table(material.runs), _settings_table(material.runs)]
    lead = "One row per run, in the order of the pipeline; the settings can be opened below."
    return Section("summary", "Summary", lead, blocks)


def _tiles(material: Material) -> list[tuple[str, str]]:
    """The numbers a reader looks for first."""
    tiles = []
    results = material.results
    if results is not None:
        protocol = results.protocols[0]
        for method in ("mae", "mae_plus", "moce"):
            mean = results.average(protocol, method)
            if mean is not None:
                what = f"{METHODS[method].title}, mean, {PROTOCOLS.get(protocol, protocol).lower()}"
                tiles.append((f"{100 * mean:.1f} %", what))
    for run in material.runs:
        metrics = run.info.get("metrics", {})
        if run.kind == "clusters":
            tiles.append((str(run.info["clusters"]["num_clusters"]), "clusters"))
        elif run.kind == "moce":
            tiles.append((str(run.info["routes"]), "routes through the experts"))
        elif run.kind == "headroom":
            tiles.append((f"{100 * run.info['gain']:+.1f} %", "headroom for experts"))
        elif results is None and "loss" in metrics:
            tiles.append((f"{metrics['loss']:.3f}", f"loss of {run.label}"))
    return tiles[:6]


def _runs_table(runs: list[Run]) -> Table:
    columns = ["Run", "Kind", "Data", "Images", "Key metrics", "Revision"]
    return Table("", columns, [_run_row(run) for run in runs], numbers=False)


def _run_row(run: Run) -> Row:
    metrics = run.info.get("metrics", {})
    return [
        Cell(run.name, str(run.path)),
        TITLES.get(run.kind, run.kind),
        str(run.config.get("data", run.config.get("suite", ""))),
        f"{run.info['images']:,}" if "images" in run.info else "",
        ", ".join(f"{NAMES.get(name, name)} {_number(value)}" for name, value in metrics.items()),
        run.info.get("git_revision") or "",
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings_table(runs: list[Run]) -> Table:
    """One row per setting or version, one column per run."""
    shown = [
        {
            **{name: _setting(value) for name, value in run.config.items()},
            **{f"version of {k}": str(v) for k, v in run.info.get("versions", {}).items()},
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for values in shown for name in values))
    rows = [[name, *(values.get(name, "") for values in shown)] for name in names]
    columns = ["Setting", *(run.name for run in runs)]
    return Table("Settings and versions", columns, rows, folded=True, numbers=False)


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "–"
    return str(value)
