"""Domains of images, by the first folder of their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

MOST_DOMAINS = 8


def domain_of(identity: str) -> str:
    """The first folder of an image's id; "" without a folder."""
    return identity.split("/")[0] if "/" in identity else ""


def find_domains(ids: Iterable[str]) -> list[str]:
    """First folders of the ids, most images first; none unless there are 2 to MOST_DOMAINS."""
    counts = Counter(domain_of(name) for name in ids)
    return [name for name, _ in counts.most_common()] if 2 <= len(counts) <= MOST_DOMAINS else []
