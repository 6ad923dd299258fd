"""config.yaml, model.json, model.safetensors and metrics of a run."""

from __future__ import annotations
from typing import Any
from collections.abc import Callable
from moce.errors import MoceError
from pathlib import Path
from moce.config import Settings
from torch import Tensor
import json
from moce.runtime.distributed import run_on_rank0
import platform
from moce.runs.files import read_lines
from moce.runs.files import read_tensors
from moce.config.load import read_yaml
import subprocess
from importlib.metadata import version
from moce.runs.files import write_json
from moce.runs.files import write_tensors
from moce.runs.files import write_text
import yaml

WEIGHTS, INFO, CONFIG, METRICS = "model.safetensors", "model.json", "config.yaml", "metrics.jsonl"
SKIPPED, STATE, TIMINGS = "skipped.jsonl", "state", "timings.jsonl"


def write_config(folder: Path, settings: Settings) -> None:
    """Write the settings as they were resolved, in their order."""
    content = settings.model_dump(mode="json", by_alias=True)
    write_text(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings a run was started with. Raises MoceError if they are missing or damaged."""
    try:
        content = read_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoceError(f"cannot read {folder / CONFIG}: {error}") from None
    if not isinstance(content, dict):
        raise MoceError(f"{folder / CONFIG} is damaged: it holds no settings")
    return content


def write_model(folder: Path, kind: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write weights, then what they are: a folder with model.json is a finished run."""
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / INFO, {"kind": kind, **info, **provenance()})


def read_model(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(info, tensors) of a finished run. Raises MoceError if it is none, or of another kind."""
    info = read_info(folder)
    if info["kind"] != kind:
        raise MoceError(f"{folder} is a run of kind '{info['kind']}', not '{kind}'")
    return info, read_tensors(folder / WEIGHTS)


def read_info(folder: Path) -> dict[str, Any]:
    """model.json of a run. Raises MoceError if the folder is no finished run."""
    path = Path(folder) / INFO
    if not path.is_file():
        unfinished = (Path(folder) / CONFIG).is_file()
        reason = "is not finished (run its verb again)" if unfinished else "is not a moce run"
        raise MoceError(f"{folder} {reason}: it has no {INFO}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        info["kind"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise MoceError(f"{path} is damaged: {error}") from None
    return info


def provenance() -> dict[str, Any]:
    """Versions and git revision, so that a result can be traced."""
    packages = ("moce", "torch", "timm", "numpy")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"versions": versions, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    """Revision of the checkout moce runs from; None when it is installed as a package."""
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_skipped(folder: Path, skipped: list[tuple[str, str]], say: Callable[[str], None]) -> None:
    """List the images that could not be read, and say how many there are."""
    if skipped:
        lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in skipped]
        write_text(folder / SKIPPED, "".join(lines))
        say(f"skipped {len(skipped)} unreadable images (listed in {folder / SKIPPED})")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; what follows a line cut short by a kill is left out."""
    return read_lines(Path(folder) / METRICS, "step")


def read_timings(folder: Path) -> list[dict[str, Any]]:
    """The lines of timings.jsonl; of runs older than it, metrics.jsonl has the times."""
    rows = read_lines(Path(folder) / TIMINGS, "step")
    return rows or [row for row in read_metrics(folder) if "step_s" in row]


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl. Raises MoceError if there is none."""
    rows = run_on_rank0(lambda: read_metrics(folder)[-1:])
    if not rows:
        raise MoceError(f"{folder / METRICS} is missing or damaged; train again with --overwrite")
    return rows[-1]
