"""Signature and docstring of a function that takes the settings of a class as keyword arguments."""

from __future__ import annotations

import types
import typing
from inspect import Parameter, Signature
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, Union

from moce.config.base import Accepts, Settings


class _Hint(str):
    """A type as source text, shown without quotes."""

    __repr__ = str.__str__


def signature_of(settings: type[Settings], positional: tuple[str, ...], returns: str) -> Signature:
    """`positional` first, by position or name; then all other settings by name, required ones first."""
    fields = settings.model_fields
    required = [name for name, field in fields.items() if field.is_required()]
    parameters = [
        _parameter(settings, name, positional=name in positional)
        for name in dict.fromkeys((*positional, *required, *fields))
    ]
    return Signature(parameters, return_annotation=_Hint(returns))


def _parameter(settings: type[Settings], name: str, *, positional: bool) -> Parameter:
    field = settings.model_fields[name]
    hint = typing.get_type_hints(settings, include_extras=True)[name]
    default = Parameter.empty if field.is_required() else field.default
    if positional and typing.get_origin(hint) is tuple:
        item = _Hint(python_type(typing.get_args(hint)[0]))
        return Parameter(name, Parameter.VAR_POSITIONAL, annotation=item)
    return Parameter(
        name,
        Parameter.POSITIONAL_OR_KEYWORD if positional else Parameter.KEYWORD_ONLY,
        default=str(default) if isinstance(default, Path) else default,
        annotation=_Hint(python_type(hint)),
    )


def docstring_of(settings: type[Settings], signature: Signature) -> str:
    """The summary of a settings class, and type, default and description of every setting."""
    lines = []
    for name, parameter in signature.parameters.items():
        empty = parameter.default is Parameter.empty
        default = "" if empty else f", default {parameter.default!r}"
        description = settings.model_fields[name].description
        lines += wrap(
            f"{name} ({parameter.annotation}{default}): {description}",
            width=96,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
    return "\n".join([(settings.__doc__ or "").strip(), "", "Args:", *lines])


def python_type(hint: Any) -> str:
    """What a caller in Python may pass for a setting of this type, as source text."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        accepted = [extra.hint for extra in inner if isinstance(extra, Accepts)]
        return accepted[0] if accepted else python_type(inner[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(python_type, inner))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, inner))}]"
    if origin is tuple:
        return f"Sequence[{python_type(inner[0])}]"
    if origin is dict:
        return f"dict[{', '.join(map(python_type, inner))}]"
    if hint is Path:
        return "str | Path"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
