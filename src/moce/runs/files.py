"""Atomic writes; JSON, JSON lines and safetensors."""

from __future__ import annotations
from typing import Any
from collections.abc import Iterator
from moce.errors import MoceError
from pathlib import Path
from torch import Tensor
from contextlib import contextmanager
import hashlib
from moce.runtime.distributed import is_rank0
import json
import os
import tempfile
import torch

CHECKSUM = "sha256"


def clone_shared_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, copied only where two share their memory: safetensors takes no such."""
    ready: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        ready[name] = value.clone() if memory in known else value
        known.add(memory)
    return ready


def make_folder(path: Path) -> None:
    """Make a folder that files go to, if it is not there. Raises MoceError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoceError(f"cannot make {path}: {error.strerror}") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place if all went well.

    Raises MoceError if it cannot be written; nothing is left of it then.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())  # on disk before it has its name, should the power fail
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing to `path` becomes a MoceError that names it."""
    try:
        yield
    except OSError as error:
        raise MoceError(f"cannot write {path}: {error.strerror or error}") from error


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add a line of JSON to a file. A process killed meanwhile may leave a part of it."""
    line = json.dumps(content, allow_nan=False) + "\n"
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


def write_text(path: Path, text: str) -> None:
    """Write a file. As all that is written to a run: of several processes, the main one does."""
    if not is_rank0():
        return
    with atomic(path) as temporary:
        # A path may hold bytes that are no text; they are written as \udcff.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Save tensors by name as safetensors; of several processes, the main one does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not is_rank0():
        return
    with atomic(path) as temporary:
        try:
            save_file(clone_shared_tensors(tensors), temporary, metadata)
        except SafetensorError as error:
            raise MoceError(f"cannot write {path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises MoceError if the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot read weights {path}: {error}") from None


def read_tensor_metadata(path: Path) -> dict[str, str]:
    """What `write_tensors` was told beside the tensors. Raises MoceError as `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot read weights {path}: {error}") from None


def read_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, if any, up to the first that is damaged or lacks `key`."""
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or (key is not None and key not in row):
            break
        rows.append(row)
    return rows


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
