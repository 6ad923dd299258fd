"""YAML and keyword arguments to validated settings: all mistakes in one message."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from moce.config import Settings, settings_classes
from moce.config.facts import facts_of
from moce.errors import MoceError

S = TypeVar("S", bound=Settings)
OTHER_WORDS = {  # of other programs, for a setting or a part of its name
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "arch": "model",
    "output": "out",
    "output_dir": "out",
    "outdir": "out",
    "image_size": "img_size",
    "pretrained": "init",
    "checkpoint": "init",
    "weights": "init",
    "gpus": "device",
    "workers": "threads",
    "num_workers": "threads",
    "amp": "precision",
    "fp16": "precision",
}
PLAIN = {"path_type": "must be a path"}  # where pydantic speaks of Python's classes
_shown = reprlib.Repr()  # a few lines of YAML can make a value that no screen has room for
_shown.maxstring = _shown.maxother = 200


# --- validation -----------------------------------------------------------------------------------


def parse(kind: type[S], values: dict[str, Any], shown: Callable[[str], str] | None = None) -> S:
    """Validate `values` as settings of `kind`. Raises MoceError that lists every mistake.

    shown: how the user writes a setting (default: by name).
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        mistakes = _one_per_choice(_without_consequences(error.errors()))
    lines, valid = [], {}
    for mistake in mistakes:
        *place, name = mistake["loc"]
        known = _names_at(kind, place)
        near = closest(str(name), known)
        lines.append(_describe(mistake, near, shown))
        if mistake["type"] == "extra_forbidden" and near is None:
            valid[".".join(map(str, place))] = known
    for of, names in valid.items():
        lines.append(f"valid settings{of and f' of {of}'}: {', '.join(names)}")
    raise MoceError("; ".join(lines))


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like an unknown one, or that has it as a part, if any is."""
    known = list(known)
    bare = {other: other.lstrip("-").replace("-", "_") for other in known}
    meant = name.lstrip("-").replace("-", "_")
    meant = OTHER_WORDS.get(meant, meant)
    same = [other for other in known if bare[other] == meant]
    within = [other for other in known if meant in bare[other].split("_")]
    return next(iter(same or within or difflib.get_close_matches(name, known, n=1)), None)


def _without_consequences(mistakes: list[Any]) -> list[Any]:
    """Drop "too short" of lists that are too short only because their items are wrong."""
    places = [mistake["loc"] for mistake in mistakes]

    def follows(mistake: Any) -> bool:
        place = mistake["loc"]
        inside = any(p[: len(place)] == place and len(p) > len(place) for p in places)
        return mistake["type"] == "too_short" and inside

    return [mistake for mistake in mistakes if not follows(mistake)]


def _one_per_choice(mistakes: list[Any]) -> list[Any]:
    """Join the mistakes of a value that may be of several types: "backbone or a number" is one value."""
    joined: dict[tuple[Any, ...], Any] = {}
    for mistake in mistakes:
        *place, last = mistake["loc"]
        named = mistake["type"] in ("extra_forbidden", "missing")
        chosen = (
            isinstance(last, str)
            and not named
            and ("-" in last or "[" in last or last in ("int", "float"))
        )
        key = tuple(place) if place and chosen else mistake["loc"]
        if key in joined:
            message = mistake["msg"].removeprefix("Input should be ")
            joined[key]["msg"] += f" or {message}"
        else:
            joined[key] = {**mistake, "loc": key}
    return list(joined.values())


def _names_at(kind: type[Settings], place: list[int | str]) -> list[str]:
    """The valid names at a place such as ("tasks", 0) of settings; none if it holds no settings."""
    for part in place:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(part)
        inner = (field.annotation, *get_args(field.annotation)) if field else ()
        found = [t for t in inner if isinstance(t, type) and issubclass(t, Settings)]
        if not found:
            return []
        kind = found[0]
    return list(kind.model_fields)


def _describe(mistake: Any, near: str | None, shown: Callable[[str], str] | None) -> str:
    name = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "missing":
        return f"{shown(name) if shown else f'setting {name!r}'} is missing"
    if mistake["type"] != "extra_forbidden":
        wrong = PLAIN.get(mistake["type"], mistake["msg"].lower())
        return f"setting '{name}': {wrong} (got {_shown.repr(mistake['input'])})"
    if name in renamed():
        return f"setting '{name}' is now '{renamed()[name]}'"
    return f"unknown setting '{name}'" + (f" (did you mean '{near}'?)" if near else "")


# --- names of moce 0.1.0 --------------------------------------------------------------------------


@cache
def renamed() -> dict[str, str]:
    """The settings with another name in moce 0.1.0: its name then, and now."""
    facts = [pair for kind in settings_classes() for pair in facts_of(kind).items()]
    return {fact["was"]: name for name, fact in facts if "was" in fact}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file that moce 0.1.0 may have written. Raises MoceError if two have one name."""
    twice = [old for old in values if renamed().get(old) in values]
    if twice:
        raise MoceError(f"setting '{twice[0]}' is now '{renamed()[twice[0]]}': give one of them")
    return {renamed().get(name, name): value for name, value in values.items()}


# --- YAML -----------------------------------------------------------------------------------------


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises MoceError if it is missing or not a mapping of settings."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoceError(f"cannot read recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise MoceError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise MoceError(f"recipe {path} must consist of 'setting: value' lines")
    return with_new_names(content)


def read_yaml(text: str) -> Any:
    """Parse YAML of plain values only. Raises ValueError with a message in one line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # !!int of a word raises ValueError
        raise ValueError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    """Refuses duplicate names, of which YAML's own loader takes the last, and {name:value}."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, value in node.value:
            plain = isinstance(key, yaml.ScalarNode) and key.style is None
            if plain and ":" in key.value and value.start_mark.index == value.end_mark.index:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' needs a space after the colon", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
