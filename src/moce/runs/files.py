"""Atomic writes; JSON, JSON lines and safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moce.errors import MoceError
from moce.runtime.launch import is_rank0

CHECKSUM = "sha256"
TEXT_START = 400  # bytes that show what a text is


def clone_shared_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, cloned where two share memory, which safetensors refuses."""
    ready: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        ready[name] = value.clone() if memory in known else value
        known.add(memory)
    return ready


def make_folder(path: Path) -> None:
    """Create a folder if it does not exist. Raises MoceError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoceError(f"cannot make {path}: {error.strerror}") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a temporary file beside `path` that replaces it at the end.

    Its mode follows the umask, whatever a library that writes it sets. Raises MoceError if it cannot
    be written; no temporary file remains then.
    """
    with writing(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            temporary.chmod(mode)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())  # before the rename, in case the power fails
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError within the context as a MoceError that names `path`."""
    try:
        yield
    except OSError as error:
        raise MoceError(f"cannot write {path}: {error.strerror or error}") from error


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append a line of JSON to a file. A killed process may leave an incomplete line."""
    line = json.dumps(content, allow_nan=False) + "\n"
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, on rank 0."""
    if not is_rank0():
        return
    with atomic(path) as temporary:
        # A path may contain bytes that are not text; they are written as \udcff.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file atomically, on rank 0."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Save tensors by name as safetensors, on rank 0."""
    if not is_rank0():
        return
    with atomic(path) as temporary:
        try:
            save_file(clone_shared_tensors(tensors), temporary, metadata)
        except SafetensorError as error:
            raise MoceError(f"cannot write {path}: {error}") from None


def raise_if_text(path: Path) -> None:
    """Raise MoceError, saying what it is, if a file that should hold weights holds text or nothing."""
    try:
        with path.open("rb") as file:
            start = file.read(TEXT_START)
    except OSError as error:
        raise MoceError(f"cannot read weights {path}: {error.strerror}") from None
    found = _kind_of_text(start)
    if found:
        raise MoceError(f"cannot read weights {path}: {found}")


def _kind_of_text(start: bytes) -> str | None:
    """What the first bytes of a text show; None of anything else."""
    text = start.decode("utf-8", "ignore").lstrip("\ufeff \r\n\t")
    if not start:
        return "the file is empty"
    if b"\0" in start or len(text) < 0.9 * len(start.lstrip()) or not _is_printable(text):
        return None
    if text.startswith("version https://git-lfs"):
        return "it is a pointer of git-lfs; run 'git lfs pull' in its folder to get the weights"
    if text[:100].lower().startswith(("<!doctype html", "<html")):
        return "it is a web page; download the file itself, perhaps with a login"
    return f"it is text, which starts with {text[:30]!r}"


def _is_printable(text: str) -> bool:
    return all(character.isprintable() or character in "\r\n\t" for character in text)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises MoceError if the file is missing, corrupt or text."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise MoceError(f"cannot read weights {path}: it is no file")
    if path.is_file():
        raise_if_text(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot read weights {path}: {error}") from None


def read_tensor_metadata(path: Path) -> dict[str, str]:
    """The `metadata` of `write_tensors`. Raises MoceError as `read_tensors`."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot read weights {path}: {error}") from None


def read_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, if it exists, up to the first that is corrupt or lacks `key`."""
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
    """SHA-256 of the names and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
