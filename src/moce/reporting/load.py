"""What there is to report on: the runs under the given folders, and the results of a demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moce.errors import MoceError, raise_if_corrupt
from moce.reporting.images import Source
from moce.reporting.results_table import Results
from moce.runs.model import CONFIG, INFO, read_config, read_info, read_metrics

RESULTS = "results.json"
TITLES = {
    "mae": "MAE",
    "clusters": "Clusters",
    "mae_plus": "MAE+",
    "moce": "MoCE",
    "classifier": "Fine-tuned",
    "unfinished": "Unfinished",
}


@dataclass
class Run:
    """One run folder. kind: as in model.json, mae_plus for a continued MAE, or unfinished."""

    path: Path
    kind: str
    info: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    label: str = ""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def anchor(self) -> str:
        """The folder's name, as far as it may stand in an address."""
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in self.name)

    @property
    def is_mae(self) -> bool:
        return self.kind in ("mae", "mae_plus")


@dataclass
class Material:
    """runs: in the order of the pipeline; results: what results.json holds, if any."""

    runs: list[Run]
    results: dict[str, Any] | None
    _sources: dict[str, Source] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Run]:
        return [run for run in self.runs if run.kind in kinds]

    def source(self, data: str) -> Source:
        """The images of a DATA argument. Raises MoceError if they are not there any more."""
        if data not in self._sources:
            self._sources[data] = Source(data)
        return self._sources[data]


def gather(folders: Sequence[Path]) -> Material:
    """Runs and results of all folders. Raises MoceError if one is no run and holds none."""
    if not folders:
        raise MoceError("no runs given: name run folders, or a folder that holds some")
    paths: dict[Path, Path] = {}
    results = None
    for folder in folders:
        found = _runs_in(folder)
        results = results or _read_results(folder / RESULTS)
        paths.update((path.resolve(), path) for path in found)
    runs = [_read_run(path) for path in paths.values()]
    order = list(TITLES)
    runs.sort(key=lambda run: order.index(run.kind) if run.kind in order else len(order))
    _name(runs)
    return Material(runs, results)


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MoceError(f"no such folder: {folder}")
    if _is_run(folder):
        return [folder]
    found = sorted(child for child in folder.iterdir() if child.is_dir() and _is_run(child))
    if (folder / "selection.json").is_file():
        raise MoceError(f"{folder} is an exported backbone; the report shows the run it came from")
    if not found:
        raise MoceError(f"{folder} is not a moce run and holds none")
    return found


def _is_run(folder: Path) -> bool:
    return (folder / INFO).is_file() or (folder / CONFIG).is_file()


def _read_run(path: Path) -> Run:
    config = read_config(path) if (path / CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise MoceError(f"{path / CONFIG} is damaged: it holds no settings")
    # Without model.json the run has not ended; its losses can be looked at all the same.
    info = read_info(path) if (path / INFO).is_file() else {"kind": "unfinished"}
    kind = str(info["kind"])
    with raise_if_corrupt(path / INFO):
        _check_info(kind, info)
    if kind == "mae" and config.get("method") == "mae":
        kind = "mae_plus"
    return Run(path, kind, info, config, [row for row in read_metrics(path) if _is_logged(row)])


def _is_logged(row: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl holds the numbers that are drawn."""
    names = ("step", "epoch", "loss", "reconstruction")
    return all(isinstance(row.get(name, 0.0), int | float) for name in names)


def _check_info(kind: str, info: dict[str, Any]) -> None:
    """Raise what `intact` takes for damage if what the sections read is not there."""
    for value in info.get("metrics", {}).values():
        if not isinstance(value, int | float):
            raise TypeError(f"a metric is {value!r}, no number")
    if not isinstance(info.get("images", 0), int):
        raise TypeError(f"images are {info['images']!r}, no number")
    if kind == "clusters":
        int(info["clusters"]["num_clusters"])
        dict(info["clusters"]["encoder"]["model_args"])
    if kind == "moce":
        int(info["routes"])
        list(zip(*info["experts_of_clusters"].values(), strict=True))
        int(info["spec"]["num_clusters"])
        int(info["spec"]["num_experts"])


def _name(runs: list[Run]) -> None:
    """Label every run by its method; where several share one, by its folder too."""
    kinds = [run.kind for run in runs]
    for run in runs:
        title = TITLES.get(run.kind, run.kind)
        run.label = title if kinds.count(run.kind) == 1 else f"{title} ({run.name})"


def _read_results(path: Path) -> dict[str, Any] | None:
    """The content of a demo's results.json; None if there is none or it is of another kind."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MoceError(f"{path} is damaged: {error}") from None
    if not (isinstance(content, dict) and "rows" in content and "selection" in content):
        return None
    with raise_if_corrupt(path):
        results = Results(content)
        for task in results.tasks:
            for protocol, method in results.columns():
                results.mean(task, protocol, method)
        for choice in results.selection.values():
            float(choice["share"])
    return content
