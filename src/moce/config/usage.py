"""Which settings have an effect: refuse those that would be ignored, ask for those needed."""

from __future__ import annotations

from typing import Any

from moce.config.base import Settings
from moce.config.facts import GIVEN, Facts, facts_of
from moce.errors import MoceError


def explicitly_set(settings: Settings) -> set[str]:
    """Settings unlike their defaults: a resumed run has read all of them from its config.yaml."""
    fields = type(settings).model_fields
    return {n for n in settings.model_fields_set if getattr(settings, n) != fields[n].default}


def flag(name: str, value: object = None) -> str:
    """The flag that sets a setting to a value."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def replaced_by(kind: type[Settings], values: dict[str, Any]) -> dict[str, str]:
    """The settings without effect because another of `values` replaces them: their name, its name."""
    return {
        facts["replaces"]: name
        for name, facts in facts_of(kind).items()
        if "replaces" in facts and values.get(name)
    }


def check_used(settings: Settings, asked: Settings) -> None:
    """Raise MoceError if `asked` has settings that `settings` do not use, or one is missing.

    settings: all of the run; asked: those of this call, without what a resumed run has recorded.
    """
    facts, unused = facts_of(settings), dict[str, list[str]]()
    # A resumed run may have recorded both of two settings, such as the steps of its epochs.
    replaced = replaced_by(type(settings), dict(asked))
    for name in sorted(explicitly_set(asked)):
        reason = _why_unused(settings, name, facts, replaced)
        if reason:
            unused.setdefault(reason, []).append(flag(name, getattr(asked, name)))
    mistakes = [
        f"leave out {' and '.join(flags)}: {reason} {'it' if len(flags) == 1 else 'them'}"
        for reason, flags in unused.items()
    ]
    for name, fact in facts.items():
        missing = fact.get("needed") and getattr(settings, name) is None
        if missing and not _why_unused(settings, name, facts, replaced):
            by = [f"{other} {getattr(settings, other)}" for other in fact["used_with"]]
            mistakes.append(f"add {flag(name)}: {' with '.join(by)} needs it")
    if mistakes:
        raise MoceError("; ".join(mistakes))


def _why_unused(
    settings: Settings, name: str, facts: dict[str, Facts], replaced: dict[str, str]
) -> str | None:
    """Why a setting has no effect, as words before "it"; None if it has one.

    A condition on a setting that has no effect itself does not count.
    """
    if name in replaced:
        return f"{flag(replaced[name])} replaces"
    for other, values in facts[name].get("used_with", {}).items():
        value = getattr(settings, other)
        met = bool(value) if values == (GIVEN,) else value in values
        if not met and not _why_unused(settings, other, facts, replaced):
            only = values == (GIVEN,)
            return f"only {flag(other)} uses" if only else f"{other} {value} does not use"
    return None
