"""From plain values to settings: all mistakes in one message, with the nearest valid name."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from moce.config import Settings
from moce.errors import MoceError

S = TypeVar("S", bound=Settings)
_shown = reprlib.Repr()  # YAML can say in a few lines what no screen has room for
_shown.maxstring = _shown.maxother = 200


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
    return f"setting '{name}': {mistake['msg'].lower()} (got {_shown.repr(mistake['input'])})"


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises MoceError if it is missing or no mapping of settings."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoceError(f"cannot read recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise MoceError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise MoceError(f"recipe {path} must hold 'setting: value' lines")
    return content


def read_yaml(text: str) -> Any:
    """What YAML says, of plain values only. Raises ValueError, its message in one line, if it is none."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # values of !!int and others, too
        raise ValueError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def explicitly_set(settings: Settings) -> set[str]:
    """Settings unlike their defaults: a resumed run has read all of them from its config.yaml."""
    fields = type(settings).model_fields
    return {n for n in settings.model_fields_set if getattr(settings, n) != fields[n].default}
