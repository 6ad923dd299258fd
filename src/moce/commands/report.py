"""moce report: runs and results as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.config import ReportSettings
from moce.errors import MoceError, counted
from moce.reporting.load import gather
from moce.reporting.page import build_sections, render
from moce.runs.files import make_folder, write_text


@dataclass
class ReportResult:
    """page: the file; runs: how many it shows; sections: their titles; size: of the file in bytes."""

    page: Path
    runs: int
    sections: list[str]
    size: int

    def summary(self) -> str:
        return (
            f"{counted(self.runs, 'run')} in {counted(len(self.sections), 'section')}, "
            f"{self.size / 1e6:.1f} MB: {self.page}"
        )


def run(settings: ReportSettings) -> ReportResult:
    material = gather(settings.runs)
    _prepare(settings.out)
    sections = build_sections(material, settings.max_images)
    title = " and ".join(dict.fromkeys(path.resolve().name for path in settings.runs))
    page = render(title, sections)
    write_text(settings.out, page)
    titles = [section.title for section in sections]
    return ReportResult(settings.out, len(material.runs), titles, settings.out.stat().st_size)


def _prepare(out: Path) -> None:
    """Raise MoceError if the page cannot be written; make its folder."""
    if out.is_dir():
        raise MoceError(
            f"{out} is a folder; give a file for the page, such as {out / 'report.html'}"
        )
    if out.exists() and out.suffix.lower() not in (".html", ".htm"):
        raise MoceError(f"{out} exists and is not an HTML page; choose another name for the report")
    make_folder(out.parent)
