"""Section Summary: the runs, their settings and their key metrics."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from moce.reporting.elements import Section, html
from moce.reporting.load import TITLES, Material, Run
from moce.reporting.results_table import percent_cell

NAMES = {
    "rounds": "iterations",  # moce 0.1.0
    "smallest": "smallest cluster",
    "largest": "largest cluster",
    "marginal_error": "largest error of a cluster's mass",
}


def summary_section(material: Material) -> Section:
    columns = ["Run", "Kind", "Data", "Images", "Key metrics", "Revision"]
    rows = [_run_row(run) for run in material.runs]
    blocks = [html.table(columns, rows, numbers=False), _settings_table(material.runs)]
    lead = "One row per run, in the order of the pipeline; the settings can be opened below."
    return Section("summary", "Summary", lead, blocks)


def _run_row(run: Run) -> list[str | Markup]:
    metrics = run.info.get("metrics") or _metrics_of(run)
    return [
        html.name(run.name, str(run.path)),
        TITLES.get(run.kind, run.kind),
        str(next(filter(None, map(run.config.get, ("images", "data", "suite"))), "")),
        f"{run.info['images']:,}" if "images" in run.info else "",
        ", ".join(f"{NAMES.get(name, name)} {_number(value)}" for name, value in metrics.items()),
        run.info.get("git_revision") or "",
    ]


def _metrics_of(run: Run) -> dict[str, Any]:
    """The key metrics of what is no model: a headroom, a probe, an evaluation."""
    if run.kind == "headroom":
        return {"headroom": f"{100 * run.info['gain']:+.2f} %"}
    if run.kind == "probe":
        return {row["metric"]: f"{percent_cell(row['values'])} %" for row in run.rows}
    return {"rows": len(run.rows)} if run.rows else {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings_table(runs: list[Run]) -> Markup:
    """One row per setting or version, one column per run."""
    shown = [
        {
            **{name: str(value) for name, value in run.config.items()},
            **{f"version of {k}": str(v) for k, v in run.info.get("versions", {}).items()},
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for values in shown for name in values))
    rows = [[name, *(values.get(name, "") for values in shown)] for name in names]
    columns = ["Setting", *(run.name for run in runs)]
    return html.table(columns, rows, "Settings and versions", folded=True, numbers=False)
