"""From plain values to settings: all mistakes in one message, with the nearest valid name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

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
        mistakes = _without_consequences(error.errors())
        told = [_describe(mistake, _names_at(kind, mistake["loc"][:-1])) for mistake in mistakes]
        for place in dict.fromkeys(m["loc"][:-1] for m in mistakes if _like_none(kind, m)):
            of = f" of {'.'.join(map(str, place))}" if place else ""
            told.append(f"valid settings{of}: {', '.join(_names_at(kind, place))}")
        raise MoceError("; ".join(told)) from None


def _without_consequences(mistakes: list[Any]) -> list[Any]:
    """Without lists that are too short only because what is in them is wrong."""
    places = [mistake["loc"] for mistake in mistakes]

    def follows(mistake: Any) -> bool:
        place = mistake["loc"]
        inside = any(p[: len(place)] == place and len(p) > len(place) for p in places)
        return mistake["type"] == "too_short" and inside

    return [mistake for mistake in mistakes if not follows(mistake)]


def _names_at(kind: type[Settings], place: tuple[int | str, ...]) -> list[str]:
    """The names that are valid at a place such as ("tasks", 0) of settings; none if it holds no settings."""
    for part in place:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(str(part))
        inner = (field.annotation, *get_args(field.annotation)) if field else ()
        found = [t for t in inner if isinstance(t, type) and issubclass(t, Settings)]
        if not found:
            return []
        kind = found[0]
    return [field.alias or name for name, field in kind.model_fields.items()]


def _like_none(kind: type[Settings], mistake: Any) -> bool:
    """Whether it is an unknown name that is like no valid one."""
    known = _names_at(kind, mistake["loc"][:-1])
    name = str(mistake["loc"][-1]) if mistake["loc"] else ""
    return mistake["type"] == "extra_forbidden" and not difflib.get_close_matches(name, known, n=1)


def _describe(mistake: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
        return f"unknown setting '{name}'" + (f" (did you mean '{near[0]}'?)" if near else "")
    if mistake["type"] == "missing":
        return f"setting '{name}' is missing"
    return f"setting '{name}': {mistake['msg'].lower()} (got {mistake['input']!r})"


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises MoceError if it is missing or no mapping of settings."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoceError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise MoceError(f"recipe {path} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise MoceError(f"recipe {path} must hold 'setting: value' lines")
    return content
