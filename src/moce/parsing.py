"""From plain values to settings: all mistakes in one message, with the nearest valid name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from moce.config import Settings
from moce.errors import MoceError

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], values: dict[str, Any]) -> S:
    """Validate `values` as settings of `kind`. Raises MoceError naming every mistake at once."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        known = [field.alias or name for name, field in kind.model_fields.items()]
        mistakes = [_describe(mistake, known) for mistake in error.errors()]
        if any(text.endswith("'") for text in mistakes):  # an unknown name like no valid one
            mistakes.append(f"valid settings: {', '.join(known)}")
        raise MoceError("; ".join(mistakes)) from None


def _describe(mistake: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown setting '{name}'" + (f" (did you mean '{near[0]}'?)" if near else "")
    if mistake["type"] == "missing":
        return f"setting '{name}' is missing"
    return f"setting '{name}': {mistake['msg'].lower()} (got {mistake['input']!r})"


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises MoceError if it is missing or no mapping of settings."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MoceError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise MoceError(f"recipe {path} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise MoceError(f"recipe {path} must hold 'setting: value' lines")
    return content
