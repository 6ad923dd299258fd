"""The tensors of any weights file or folder, without pickle: nothing in the file is executed."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from moce.errors import MoceError
from moce.runs.files import raise_if_text, read_tensor_metadata, read_tensors
from moce.weights.types import MODEL_CONFIG, RawWeights, Tensors
from moce.weights.unwrap import find_weights

PROCESSOR = "preprocessor_config.json"
INDEX_SUFFIX = ".index.json"  # of a model in several files
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS = ".safetensors"


def read_raw(
    path: Path, key: str | None = None, load: Callable[[Path], Any] | None = None
) -> RawWeights:
    """The tensors of a file (.safetensors, or .pth, .pt, .bin of plain tensors) or a folder.

    key: which of several networks in a file; load: reads files that are no safetensors (default:
    without pickle). Raises MoceError if there are none, they are corrupt, or only pickle can read
    them.
    """
    file = file_of(path)
    config, processor = (
        _read_json(file.parent / name) if (file.parent / name).is_file() else {}
        for name in (MODEL_CONFIG, PROCESSOR)
    )
    load = load or (lambda one: _load_plain(one, path))
    if file.name.endswith(INDEX_SUFFIX):
        content, header = _read_shards(file, load), {}
    else:
        content, header = _read_file(file, load), _header(file)
    raw = find_weights(content, path, key)
    raw.config, raw.processor, raw.header = config, processor, header
    return raw


def file_of(path: Path) -> Path:
    """The file of weights at a path. Raises MoceError if there is none."""
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():  # a pipe is none: reading it would wait for ever
        raise MoceError(f"no weights at {path}")
    return file


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


def _read_file(file: Path, load: Callable[[Path], Any]) -> Any:
    if file.suffix == SAFETENSORS:
        return read_tensors(file)
    raise_if_text(file)
    return load(file)


def _header(file: Path) -> dict[str, str]:
    return read_tensor_metadata(file) if file.suffix == SAFETENSORS else {}


def _read_shards(index: Path, load: Callable[[Path], Any]) -> Tensors:
    """The tensors of all files in an index. Raises MoceError if one is missing or incomplete."""
    files: Any = _read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    # Bare names only, so that the files are in the same folder.
    if not names or not all(isinstance(n, str) and n and Path(n).name == n for n in names):
        raise MoceError(
            f"{index} is not an index of weights: it has no weight_map of names to files"
        )
    whole: Tensors = {}
    for name in sorted(set(files.values())):
        shard = _read_file(file_of(index.parent / name), load)
        if not isinstance(shard, dict):
            raise MoceError(f"{index.parent / name} holds no weights by name")
        whole |= shard
    missing = sorted(files.keys() - whole.keys())
    if missing:
        raise MoceError(f"{index} lists weights that are in none of its files: {missing[0]}")
    return whole


def _load_plain(path: Path, asked: Path) -> Any:
    """The content of a file of plain tensors. asked: what the user named, a file or its folder."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type) ([\w.]+)", str(error))
        _ask_for_trust(path, asked, found[1] if found else "more than tensors")
    except Exception as error:  # torch raises errors of many types on files that are no weights
        if "TorchScript" in str(error):
            _ask_for_trust(path, asked, "a program (TorchScript)")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if path.suffix == ".npz":
            reason = "it is a NumPy archive, as JAX writes; timm's create_model reads it (checkpoint_path)"
        raise MoceError(f"cannot read weights {path}: {reason}") from None


def _ask_for_trust(path: Path, asked: Path, content: str) -> NoReturn:
    raise MoceError(
        f"{path} holds {content}, which only pickle can read, and pickle can run any code in a "
        f"file. If you trust its source: moce convert {asked} "
        f"--out {asked.with_suffix(SAFETENSORS)} --trust-pickle"
    ) from None
