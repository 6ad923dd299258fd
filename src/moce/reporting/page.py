"""The page: which sections the runs allow, and from sections to HTML."""

from __future__ import annotations

from importlib.metadata import version

import jinja2

from moce.customization.bank import Bank, load
from moce.errors import MoceError
from moce.reporting.clusters import clusters_section, images_missing
from moce.reporting.elements import Section
from moce.reporting.experts import experts_section
from moce.reporting.headroom import headroom_section
from moce.reporting.load import Material
from moce.reporting.losses import losses_section
from moce.reporting.reconstructions import reconstructions_section
from moce.reporting.results import results_section
from moce.reporting.summary import summary_section
from moce.reporting.tasks import tasks_section

TEMPLATE = "report.html.j2"


def build_sections(material: Material, max_images: int) -> list[Section]:
    """The sections that the runs allow, in reading order."""
    banks = {run.label: load(run.path) for run in material.of_kind("moce")}
    results = material.results
    sections: list[Section | None] = [summary_section(material)]
    if results is not None:
        sections.append(results_section(results))
    sections.append(losses_section(material))
    for run in material.of_kind("clusters"):
        sections.append(clusters_section(material, run, max_images))
    sections += [headroom_section(run) for run in material.of_kind("headroom")]
    for run in material.of_kind("moce"):
        sections.append(experts_section(material, run, banks[run.label], max_images))
    sections.append(_reconstructions(material, banks))
    if results is not None:
        sections.append(tasks_section(material, results, max_images))
    return [section for section in sections if section is not None]


def _reconstructions(material: Material, banks: dict[str, Bank]) -> Section | None:
    try:
        return reconstructions_section(material, banks)
    except MoceError as error:
        lead = "Images, what the models see of them, and what they fill in."
        blocks = [images_missing(error)]
        return Section("reconstructions", "Reconstructions", lead, [*blocks])


def render(title: str, sections: list[Section]) -> str:
    """One HTML document that needs no other file. All names in it are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moce.reporting", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template(TEMPLATE)
    return template.render(title=title, sections=sections, version=version("moce"))
