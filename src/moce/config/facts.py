"""What moce knows of a setting beside its type, default and description."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, cast

from pydantic import BaseModel, Field

GIVEN = "given"  # in `used_with`: any value but none


class Facts(TypedDict, total=False):
    """Stands beside a setting, and nowhere else.

    input: what the setting names: images (a DATA argument), weights, or another file.
    may_change: a resumed run may have another value.
    used_with: the values of other settings with which this one has an effect.
    needed: it must be given where it has an effect.
    replaces: a setting that has no effect where this one is given.
    comes_with: where the value is already known: in a run of moce, or in any weights with a decoder.
    set_by_evaluate: `moce evaluate` sets it, so a suite must not.
    was: its name in moce 0.1.0.
    before: its value in recorded runs that lack it (default: it was off).
    """

    input: Literal["images", "weights", "file"]
    may_change: bool
    used_with: dict[str, tuple[str, ...]]
    needed: bool
    replaces: str
    comes_with: Literal["run", "decoder"]
    set_by_evaluate: bool
    was: str
    before: Any


def setting(default: Any = ..., description: str = "", **facts: Unpack[Facts]) -> Any:
    """A field of a settings class; without a default it is required."""
    return Field(default, description=description, json_schema_extra=cast(dict[str, Any], facts))


def facts_of(settings: BaseModel | type[BaseModel]) -> dict[str, Facts]:
    """The facts of every setting, by name."""
    kind = settings if isinstance(settings, type) else type(settings)
    return {
        name: cast(Facts, field.json_schema_extra or {})
        for name, field in kind.model_fields.items()
    }
