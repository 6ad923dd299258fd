"""HTML elements of a page: the macros of elements.html.j2, which escape any text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("moce.reporting", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
html: Any = ENVIRONMENT.get_template("elements.html.j2").module


@dataclass
class Section:
    """anchor: its id in the page; lead: one sentence on how to read it; blocks: HTML elements."""

    anchor: str
    title: str
    lead: str
    blocks: list[Markup]
