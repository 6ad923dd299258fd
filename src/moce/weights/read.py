"""Read a weights file or folder, of whatever names, without running anything that is in it."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce.errors import MoceError
from moce.runs.files import read_tensor_metadata, read_tensors
from moce.weights.types import Source

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
INDEX_SUFFIX = ".index.json"  # of a model in several files
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher")
DATA_PARALLEL = "module."

Content = tuple[dict[str, Tensor], dict[str, str], list[str]]  # tensors, header, notes


def read_source(path: Path) -> Source:
    """The tensors of a file (.safetensors, or .pth, .pt, .bin of plain tensors) or of a folder.

    Raises MoceError if there is none, it is damaged, or it can be read by pickle only.
    """
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise MoceError(f"no weights at {path}")
    beside = [file.parent / name for name in (CONFIG, PROCESSOR)]
    config, processor = (_read_json(at) if at.is_file() else {} for at in beside)
    if file.name.endswith(INDEX_SUFFIX):
        tensors, header, notes = _read_shards(file)
    else:
        tensors, header, notes = _read_file(file)
    return Source(str(path), tensors, config, header, notes, processor)


def _in_folder(folder: Path) -> Path:
    names = [name + suffix for name in IN_FOLDERS for suffix in ("", INDEX_SUFFIX)]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise MoceError(f"{folder} is not a moce run, and it holds no weights ({', '.join(names)})")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoceError(f"cannot read {path}: {error}") from None
    return content if isinstance(content, dict) else {}


def _read_file(file: Path) -> Content:
    if file.suffix == ".safetensors":
        return read_tensors(file), read_tensor_metadata(file), []
    tensors, notes = unwrap(_load_plain(file), file)
    return tensors, {}, notes


def _read_shards(index: Path) -> Content:
    """The tensors of all files that an index names. Raises MoceError if one is not there or not whole."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_name, places.values())):
        raise MoceError(f"{index} is no index of weights: it has no weight_map of names to files")
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for name in sorted(set(places.values())):
        found, _, said = _read_file(index.parent / name)
        tensors |= found
        notes += said
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise MoceError(f"{index} names weights that are in none of its files: {missing[0]}")
    return tensors, {}, notes


def _is_name(name: object) -> bool:
    """Whether it is the name of a file beside the index, and leads nowhere else."""
    return isinstance(name, str) and bool(name) and Path(name).name == name


def _load_plain(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type) ([\w.]+)", str(error))
        what = found[1] if found else "more than tensors"
        raise MoceError(
            f"{path} holds {what}, which only pickle can read, and pickle can run any code that a "
            f"file holds. If you trust where it comes from: moce convert {path} "
            f"--out {path.with_suffix('.safetensors')} --trust-pickle"
        ) from None
    except Exception as error:  # torch raises whatever it likes on files that are no weights
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoceError(f"cannot read weights {path}: {reason}") from None


def unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name in what a .pth file holds, and what was left out of it.

    Raises MoceError if it holds no tensors by name.
    """
    notes: list[str] = []
    while isinstance(content, dict):
        inner = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        rest = sorted(str(name) for name in content if name != inner)
        if rest:
            notes.append(f"left out what lies beside the weights ({', '.join(rest)})")
        content = content[inner]
    if not isinstance(content, dict) or not content:
        raise MoceError(f"{path} holds no weights by name but a {type(content).__name__}")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise MoceError(f"{path} holds more than tensors: {', '.join(odd[:5])}")
    tensors = {str(name): value.detach() for name, value in content.items()}
    if all(name.startswith(DATA_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(DATA_PARALLEL): value for name, value in tensors.items()}
    return tensors, notes
