"""The docs name files that exist, and CONTRIBUTING.md draws the folders as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "moce"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
DATED = {"log.md", "CHANGELOG.md"}  # they also name files of their time: only links count there
PATH = re.compile(r"`([\w./]+(?:\.(?:py|md|yaml)|/))`")
FLOOR = re.compile(r"^    [├└]── (\w+)(?:/|\.py) ", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)")


def is_ours(path: str) -> bool:
    """Whether it is a path of the repository, not of a run (runs/mae/) or of the reader (photos/)."""
    first = Path(path).parts[0]
    folder = "/" in path and any((root / first).is_dir() for root in (ROOT, SOURCE))
    return path.endswith(".py") or (folder and first != "runs" and "NAME" not in path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    paths = {path for path in PATH.findall(page.read_text()) if is_ours(path)}
    missing = {path for path in paths if not any((r / path).exists() for r in (ROOT, SOURCE))}
    assert page.name in DATED or not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = {link for link in LINK.findall(page.read_text()) if "://" not in link}
    assert not {link for link in links if not (page.parent / link).exists()}


def test_the_picture_of_the_house_has_its_floors() -> None:
    """CONTRIBUTING.md lists the folders from the top down, and the package before them."""
    drawn = FLOOR.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert drawn == ["__init__", *(name for name in reversed(FLOORS) if name != "__main__")]
