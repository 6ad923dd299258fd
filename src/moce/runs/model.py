"""config.yaml, model.json, model.safetensors and metrics of a run."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from moce.config import Settings
from moce.config.load import read_yaml, with_new_names
from moce.errors import MoceError, counted
from moce.runs.files import read_lines, read_tensors, write_json, write_tensors, write_text
from moce.runtime.distributed import run_on_rank0

WEIGHTS, INFO, CONFIG, METRICS = "model.safetensors", "model.json", "config.yaml", "metrics.jsonl"
SKIPPED, STATE, TIMINGS = "skipped.jsonl", "state", "timings.jsonl"
LOGGERS = "loggers.json"  # in state: the runs of W&B and MLflow
TENSORBOARD, WANDB = "tensorboard", "wandb"  # folders of loggers
PICTURES = "reconstructions"  # folder of what a masked autoencoder filled in while it trained

MADE_BY = {  # the command that makes a run, by the run's kind
    "mae": "moce pretrain",
    "clusters": "moce cluster",
    "moce": "moce train",
    "token_moe": "moce train --method token_moe",
    "classifier": "moce finetune",
}
TAKEN_BY = {  # what its user may have meant to do
    "mae": "moce cluster, train --mae, probe, embed, finetune and export take; moce train gives it experts",
    "clusters": "moce train and headroom take as --clusters",
    "moce": "moce customize and evaluate take; moce customize makes a backbone for a task of it",
    "token_moe": "moce probe, finetune and evaluate take as it is",
    "classifier": "moce predict, export, embed and probe take",
}
HOLDS = {  # files of folders that are not runs, and what to do with them
    "selection.json": "is not a moce run but a backbone, which moce probe, embed, finetune and export take",
    "export.json": "is not a moce run but an export, which moce probe, embed and finetune take",
    "adaptation.json": "is not a moce run but a backbone, which moce probe, embed, finetune and export take",
    "rows.jsonl": "is not a moce run but holds results, which moce report shows",
    "results.json": "is not a moce run but holds results, which moce report shows",
}


def write_config(folder: Path, settings: Settings) -> None:
    """Write the resolved settings, in their order."""
    content = settings.model_dump(mode="json")
    write_text(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings a run was started with. Raises MoceError if they are missing or corrupt."""
    try:
        content = read_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoceError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(content, dict):
        raise MoceError(f"{folder / CONFIG} is corrupt: it contains no settings")
    return with_new_names(content)


def write_model(folder: Path, kind: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write the weights, then model.json, which marks the run as finished."""
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})  # Transformers asks for it
    write_json(folder / INFO, {"kind": kind, **info, **provenance()})


def read_model(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(info, tensors) of a finished run. Raises MoceError if it is not one, or of another kind."""
    info = read_info(folder)
    if info["kind"] != kind:
        raise MoceError(f"{folder} is {describe_kind(info['kind'])}; give one of {MADE_BY[kind]}")
    return info, read_tensors(folder / WEIGHTS)


def describe_kind(kind: str) -> str:
    """A kind of run, the command that makes it, and the commands that take it."""
    made, taken = MADE_BY.get(str(kind), "a newer moce"), TAKEN_BY.get(str(kind))
    return f"a run of {made} (kind '{kind}')" + (f", which {taken}" if taken else "")


def read_info(folder: Path) -> dict[str, Any]:
    """model.json of a run. Raises MoceError if the folder is not a finished run."""
    path = Path(folder) / INFO
    if not path.is_file():
        raise MoceError(f"{folder} {_why_no_run(Path(folder))}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        info["kind"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise MoceError(f"{path} is corrupt: {error}") from None
    return info


def _why_no_run(folder: Path) -> str:
    for name, what in HOLDS.items():
        if (folder / name).is_file():
            return what
    if (folder / CONFIG).is_file():
        return f"is not finished (run its command again): it has no {INFO}"
    return f"is not a moce run: it has no {INFO}"


def provenance() -> dict[str, Any]:
    """Versions and git revision, recorded with every result."""
    packages = ("moce", "torch", "timm", "numpy")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"versions": versions, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Revision of the checkout that moce runs from; None for an installed package."""
    checkout = Path(__file__).resolve().parents[3]  # src/moce/runs
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_skipped(folder: Path, skipped: list[tuple[str, str]], log: Callable[[str], None]) -> None:
    """List the images that could not be read, and log how many there are."""
    if skipped:
        lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in skipped]
        write_text(folder / SKIPPED, "".join(lines))
        log(f"skipped {counted(len(skipped), 'unreadable image')} (listed in {folder / SKIPPED})")


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """(id, reason) of the images that a run has listed."""
    return [(row["id"], row["reason"]) for row in read_lines(folder / SKIPPED, "id")]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, up to the first that a killed process left incomplete."""
    return read_lines(Path(folder) / METRICS, "step")


def read_timings(folder: Path) -> list[dict[str, Any]]:
    """The lines of timings.jsonl; in older runs, metrics.jsonl has the times."""
    rows = read_lines(Path(folder) / TIMINGS, "step")
    return rows or [row for row in read_metrics(folder) if "step_s" in row]


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl. Raises MoceError if there is none."""
    rows = run_on_rank0(lambda: read_metrics(folder)[-1:])
    if not rows:
        raise MoceError(f"{folder / METRICS} is missing or corrupt; use --overwrite to retrain")
    return rows[-1]
