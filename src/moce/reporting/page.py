"""The page: which sections the runs allow, and from sections to HTML."""

from __future__ import annotations

from importlib.metadata import version

from moce.customization.bank import load
from moce.reporting.clusters import clusters_section
from moce.reporting.dense import dense_section
from moce.reporting.elements import ENVIRONMENT, Section
from moce.reporting.experts import experts_section
from moce.reporting.load import Material
from moce.reporting.losses import losses_section
from moce.reporting.monitoring import monitoring_section
from moce.reporting.reconstructions import reconstructions_section
from moce.reporting.results import headroom_section, results_section
from moce.reporting.summary import summary_section


def build_sections(material: Material, max_images: int) -> list[Section]:
    """The sections that the runs allow, in reading order."""
    banks = {run.label: load(run.path) for run in material.of_kind("moce")}
    sections = [
        summary_section(material),
        results_section(material),
        dense_section(material),
        losses_section(material),
        monitoring_section(material),
        *(clusters_section(material, run, max_images) for run in material.of_kind("clusters")),
        *(headroom_section(run) for run in material.of_kind("headroom")),
        *(
            experts_section(material, run, banks[run.label], max_images)
            for run in material.of_kind("moce")
        ),
        reconstructions_section(material, banks),
    ]
    return [section for section in sections if section is not None]


def render(title: str, sections: list[Section]) -> str:
    """One HTML document that needs no other file. All names in it are escaped."""
    template = ENVIRONMENT.get_template("report.html.j2")
    return template.render(title=title, sections=sections, version=version("moce"))
