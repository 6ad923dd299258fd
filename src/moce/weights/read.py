"""The tensors of any weights file or folder, without pickle: nothing in the file is executed."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor

from moce.errors import MoceError
from moce.runs.files import read_tensor_metadata, read_tensors
from moce.weights.types import RawWeights, Tensors

MODEL_CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
INDEX_SUFFIX = ".index.json"  # of a model in several files
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher")


def read_raw(path: Path) -> RawWeights:
    """The tensors of a file (.safetensors, or .pth, .pt, .bin of plain tensors) or a folder.

    Raises MoceError if there is none, it is corrupt, or only pickle can read it.
    """
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise MoceError(f"no weights at {path}")
    config, processor = (
        _read_json(file.parent / name) if (file.parent / name).is_file() else {}
        for name in (MODEL_CONFIG, PROCESSOR)
    )
    read = _read_shards if file.name.endswith(INDEX_SUFFIX) else _read_file
    raw = read(file)
    raw.path, raw.config, raw.processor = str(path), config, processor
    return raw


def _in_folder(folder: Path) -> Path:
    names = [name + suffix for name in FOLDER_FILES for suffix in ("", INDEX_SUFFIX)]
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


def _read_file(file: Path) -> RawWeights:
    if file.suffix == ".safetensors":
        return RawWeights(str(file), read_tensors(file), header=read_tensor_metadata(file))
    return unwrap(_load_plain(file), file)


def _read_shards(index: Path) -> RawWeights:
    """The tensors of all files in an index. Raises MoceError if one is missing or incomplete."""
    files: Any = _read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    # Bare names only, so that the files are in the same folder.
    if not names or not all(isinstance(n, str) and n and Path(n).name == n for n in names):
        raise MoceError(
            f"{index} is not an index of weights: it has no weight_map of names to files"
        )
    whole = RawWeights(str(index), {})
    for name in sorted(set(files.values())):
        shard = _read_file(index.parent / name)
        whole.tensors |= shard.tensors
        whole.notes += shard.notes
    missing = sorted(files.keys() - whole.tensors.keys())
    if missing:
        raise MoceError(f"{index} lists weights that are in none of its files: {missing[0]}")
    return whole


def _load_plain(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type) ([\w.]+)", str(error))
        content = found[1] if found else "more than tensors"
        raise MoceError(
            f"{path} holds {content}, which only pickle can read, and pickle can run any code in a "
            f"file. If you trust its source: moce convert {path} "
            f"--out {path.with_suffix('.safetensors')} --trust-pickle"
        ) from None
    except Exception as error:  # torch raises errors of many types on files that are no weights
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoceError(f"cannot read weights {path}: {reason}") from None


def unwrap(content: Any, path: Path) -> RawWeights:
    """The tensors by name in the content of a .pth file; notes list what was left out.

    Raises MoceError if it holds no tensors by name.
    """
    notes: list[str] = []
    while isinstance(content, dict):
        inner = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        rest = sorted(str(name) for name in content if name != inner)
        if rest:
            notes.append(f"left out everything but the weights ({', '.join(rest)})")
        content = content[inner]
    if not isinstance(content, dict) or not content:
        raise MoceError(f"{path} holds no weights by name but a {type(content).__name__}")
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise MoceError(f"{path} holds more than tensors: {', '.join(other[:5])}")
    tensors: Tensors = {str(name): value.detach() for name, value in content.items()}
    return RawWeights(str(path), clean_state_dict(tensors), notes=notes)
