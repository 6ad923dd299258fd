"""How figures look: one style, and colors that color-blind readers can distinguish."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from moce.reporting.elements import html
from moce.reporting.images import data_uri

WIDTH = 9.4  # inches of a figure over the full column
INK, SOFT, RULE = "#24262b", "#6b717c", "#dfe2e6"


@dataclass(frozen=True)
class Look:
    title: str
    color: str
    marker: str


# Okabe and Ito's palette: one color and one marker per method on the whole page.
METHODS = {
    "mae": Look("MAE", "#7d8591", "o"),
    "mae_plus": Look("MAE+", "#0072b2", "s"),
    "moce": Look("MoCE", "#d55e00", "D"),
    "random_route": Look("random route", "#cc79a7", "X"),
    "best_route": Look("best route, cross-fitted", "#009e73", "^"),
    "unfinished": Look("unfinished", "#b59b00", "v"),
    "classifier": Look("fine-tuned", "#5d4a8a", "P"),
}
# Paul Tol's "muted" for experts, routes and other backbones.
EXPERTS = (
    "#332288", "#44aa99", "#cc6677", "#ddcc77", "#88ccee", "#117733", "#882255", "#999933", "#aa4499",
)  # fmt: skip

_STYLE: Any = {
    "text.parse_math": False,  # a $ in a folder name is not a formula
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.fonttype": "none",  # letters stay letters: small, sharp and searchable
    "svg.hashsalt": "moce",  # the same figure gives the same bytes
}


class Canvas:
    """A figure to draw on; `picture`, an HTML element, is set when the drawing is done."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.picture: Markup


@contextmanager
def drawing(height: float, alt: str) -> Iterator[Canvas]:
    """A figure in the page's style, `height` inches high, inlined as SVG at the end."""
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(height)
        yield canvas
        svg = io.BytesIO()
        canvas.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        uri = data_uri("image/svg+xml", svg.getvalue())
        canvas.picture = html.picture(uri, alt, round(96 * WIDTH), round(96 * height))


def looks_of(rows: list[dict[str, Any]]) -> list[Look]:
    """The looks of the rows' backbones: by their methods, or each its own where several share one."""
    looks: list[Look] = []
    for number, row in enumerate(rows):
        known = {"random": "random_route"}.get(row["selection"], row["selection"])
        found = [METHODS[name] for name in (known, row["backbone"]) if name in METHODS]
        if found and found[0] not in looks:
            looks.append(found[0])
        else:
            looks.append(Look(row["backbone"], *another(number)))
    return looks


def another(number: int) -> tuple[str, str]:
    """A color and a marker that no method has, as far as there are enough."""
    return EXPERTS[number % len(EXPERTS)], "osDv^P"[number % 6]


def expert_color(expert: int, num_experts: int) -> str:
    """The color of an expert, from a color map if there are more experts than the palette has."""
    if num_experts <= len(EXPERTS):
        return EXPERTS[expert]
    return to_hex(matplotlib.colormaps["turbo"](0.05 + 0.9 * expert / (num_experts - 1)))


def faded(color: str, strength: float) -> tuple[float, float, float]:
    """A color mixed with white: 1 is the color, 0 is white."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(color))
    return red, green, blue
