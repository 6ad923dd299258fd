"""Runs and results to report on, found in the given folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moce.customization.adaptation import ADAPTATION
from moce.errors import MoceError, raise_if_corrupt
from moce.evaluation.results import ROWS, read_rows
from moce.reporting.images import Source
from moce.reporting.results_table import Results
from moce.runs.model import CONFIG, INFO, read_config, read_info, read_metrics
from moce.runtime.progress import log

RESULTS = "results.json"  # of headroom; version 0.1.0 wrote one for the demo, too
TITLES = {
    "mae": "MAE",
    "clusters": "Clusters",
    "headroom": "Headroom",
    "mae_plus": "MAE+",
    "moce": "MoCE",
    "adapted": "Adapted backbone",
    "classifier": "Fine-tuned",
    "detector": "Detector",
    "segmenter": "Segmenter",
    "evaluation": "Evaluation",
    "probe": "Probe",
    "unfinished": "Unfinished",
}


@dataclass
class Run:
    """A run folder. kind: as in TITLES; info: model.json; rows: rows.jsonl; metrics: metrics.jsonl."""

    path: Path
    kind: str
    info: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    label: str = ""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def anchor(self) -> str:
        """The folder's name, restricted to characters that an address may contain."""
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in self.name)

    @property
    def is_mae(self) -> bool:
        return self.kind in ("mae", "mae_plus")


@dataclass
class Material:
    """runs: in the order of the pipeline; results: of all runs together, None if there are none."""

    runs: list[Run]
    results: Results | None
    _sources: dict[str, Source] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Run]:
        return [run for run in self.runs if run.kind in kinds]

    def source(self, data: str) -> Source:
        """The images of a DATA argument. Raises MoceError if they no longer exist."""
        if data not in self._sources:
            self._sources[data] = Source(data)
        return self._sources[data]


def gather(folders: Sequence[Path]) -> Material:
    """The runs in all folders. Raises MoceError if a folder is no run and contains none."""
    if not folders:
        raise MoceError("no runs given: name run folders, or a folder that contains some")
    paths = {path.resolve(): path for folder in folders for path in _runs_in(folder)}
    runs = [_read_run(path) for path in paths.values()]
    order = list(TITLES)
    runs.sort(key=lambda run: order.index(run.kind) if run.kind in order else len(order))
    _set_labels(runs)
    rows = _merge_rows(runs)
    return Material(runs, Results(rows) if rows else None)


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MoceError(f"no such folder: {folder}")
    if _is_run(folder):
        return [folder]
    found = sorted(child for child in folder.iterdir() if child.is_dir() and _is_run(child))
    if (folder / "selection.json").is_file():
        raise MoceError(f"{folder} is an exported backbone; report the run that it came from")
    if not found:
        raise MoceError(f"{folder} is not a moce run and contains none")
    if (folder / RESULTS).is_file():
        log(f"{folder / RESULTS} is not shown: version 0.1.0 wrote it; evaluate again")
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (INFO, CONFIG, ROWS))


def _read_run(path: Path) -> Run:
    config = read_config(path) if (path / CONFIG).is_file() else {}
    rows, info = _read_rows(path), {}
    source = next((path / n for n in (INFO, ADAPTATION) if (path / n).is_file()), path / RESULTS)
    with raise_if_corrupt(source):
        if source.name == INFO:
            info = read_info(path)
        elif source.is_file():
            content = json.loads(source.read_text(encoding="utf-8"))
            if source.name == ADAPTATION:
                info = {"kind": "adapted", **content}
            elif "groups" in content:
                info = {"kind": "headroom", **content}
        of_rows = "evaluation" if "suite" in config or not config else "probe"
        info = info or {"kind": of_rows if rows else "unfinished"}
        _check_info(info)
    kind = str(info["kind"])
    if kind == "mae" and config.get("method") == "mae":
        kind = "mae_plus"
    metrics = [row for row in read_metrics(path) if _is_logged(row)]
    return Run(path, kind, info, config, metrics, rows)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path)
    with raise_if_corrupt(path / ROWS):
        if not rows and (path / ROWS).is_file():
            raise ValueError("it has no complete row")
        for row in rows:
            [str(row[name]) for name in ("metric", "labels")]
            [float(value) for value in (*row["values"], *(row.get("figures") or {}).values())]
            choice = row.get("choice") or {}
            if "votes" in choice:
                sum(choice["votes"].values()) + sum(choice["cluster_histogram"])
                [float(choice[name]) for name in ("share", "similarity", "training_similarity")]
    return rows


def _is_logged(row: dict[str, Any]) -> bool:
    """Whether the values to draw from a line of metrics.jsonl are numbers."""
    names = ("step", "epoch", "loss", "reconstruction", "rankme", "val")
    scores = row.get("monitor", {})
    return all(isinstance(row.get(name, 0.0), int | float) for name in names) and (
        isinstance(scores, dict) and all(_is_score(values) for values in scores.values())
    )


def _is_score(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(values.get(kind), int | float) for kind in ("knn", "linear")
    )


def _check_info(info: dict[str, Any]) -> None:
    """Raise what `raise_if_corrupt` catches if something that the sections read is missing."""
    for value in info.get("metrics", {}).values():
        if not isinstance(value, int | float):
            raise TypeError(f"a metric is {value!r}, not a number")
    if not isinstance(info.get("images", 0), int):
        raise TypeError(f"images are {info['images']!r}, not a number")
    if info["kind"] == "clusters":
        int(info["clusters"]["num_clusters"])
        dict(info["clusters"]["encoder"]["model_args"])
    if info["kind"] == "moce":
        int(info["routes"])
        list(zip(*info["experts_of_clusters"].values(), strict=True))
    if info["kind"] == "headroom":
        names = ("images", "error_all", "error_alone", "gain")
        [float(group[name]) for group in info["groups"] for name in names]


def _set_labels(runs: list[Run]) -> None:
    """Label every run by its kind, and by its folder if several have that kind."""
    kinds = [run.kind for run in runs]
    for run in runs:
        title = TITLES.get(run.kind, run.kind)
        run.label = title if kinds.count(run.kind) == 1 else f"{title} ({run.name})"


def _merge_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """The rows of all runs; the folder distinguishes equal names of several runs."""
    rows, known = [], set()
    for run in runs:
        for row in run.rows:
            key = row["task"], row["protocol"], row["backbone"]
            if key in known:
                row = {**row, "backbone": f"{row['backbone']} ({run.name})"}
            known.add(key)
            rows.append(row)
    return rows
