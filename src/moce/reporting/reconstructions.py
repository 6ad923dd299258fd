"""Section Reconstructions: masked images, and what the models fill in."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup
from torch import Tensor

from moce.customization.bank import Bank
from moce.data.dataset import ImageDataset
from moce.data.domains import domain_of
from moce.errors import MoceError
from moce.inference.reconstructions import Reconstructed, reconstruct
from moce.models.encoder import EncoderSpec, input_shape
from moce.models.mae import MAE
from moce.reporting.clusters import images_missing
from moce.reporting.elements import Section, html
from moce.reporting.images import Source, montage, sample
from moce.reporting.load import Material, Run
from moce.weights.from_runs import load_mae

PER_DOMAIN, WITHOUT_DOMAINS = 4, 8  # images
COLUMNS = 2  # images beside each other
LEAD = (
    "The models see the visible patches only. Each picture is the prediction for the removed patches, "
    "with the visible ones pasted in; MoCE uses the experts of the image's cluster. Predictions that "
    "are normalized per patch are scaled back with the true patch's mean and deviation, so brightness "
    "and contrast of a patch are given."
)


@dataclass
class Model:
    """A model that reconstructs; bank: of a MoCE run."""

    label: str
    mae: MAE
    spec: EncoderSpec
    bank: Bank | None = None

    @property
    def geometry(self) -> tuple[object, ...]:
        """Models with the same geometry take the same images under the same mask."""
        return input_shape(self.mae.encoder), self.mae.patch_size, self.mae.mask_ratio

    def reconstruct(self, pixels: Tensor, stored: ImageDataset) -> Reconstructed:
        """Images [b, c, h, w] uint8, masked and filled in; stored: the same images."""
        if self.bank is not None:
            clusters = self.bank.assign(stored)[0]
            return reconstruct(self.bank.model, self.spec, pixels, clusters)
        return reconstruct(self.mae, self.spec, pixels)


def reconstructions_section(material: Material, banks: dict[str, Bank]) -> Section | None:
    """The section; None if no run reconstructs. banks: of the MoCE runs, by label."""
    runs = [run for run in material.runs if run.is_mae or run.kind == "moce"]
    if not runs:
        return None
    models = [_load(run, banks) for run in runs]
    # The last run decides on image size and mask; models that differ are left out.
    shown = [model for model in models if model.geometry == models[-1].geometry]
    columns = ["", "Input", "Masked", *(model.label for model in shown)]
    try:
        source = material.source(str(runs[-1].config.get("data")))
        rows = [_row(name, ids, source, shown) for name, ids in _groups(source)]
        blocks = [html.table(columns, rows, numbers=False)]
    except MoceError as error:
        blocks = [images_missing(error)]
    others = ", ".join(model.label for model in models if model not in shown)
    if others:
        blocks.append(html.note(f"Left out because of another image size or mask: {others}."))
    return Section("reconstructions", "Reconstructions", LEAD, blocks)


def _load(run: Run, banks: dict[str, Bank]) -> Model:
    if run.kind == "moce":
        bank = banks[run.label]
        return Model(run.label, bank.model.mae, bank.encoder_spec, bank)
    spec, mae = load_mae(run.path)
    return Model(run.label, mae.eval(), spec.encoder)


def _groups(source: Source) -> list[tuple[str, list[str]]]:
    """Some images of each domain."""
    if not source.domains:
        return [("", sample(source.ids, WITHOUT_DOMAINS))]
    members = {name: [i for i in source.ids if domain_of(i) == name] for name in source.domains}
    return [(name, sample(ids, PER_DOMAIN)) for name, ids in members.items()]


def _row(name: str, ids: list[str], source: Source, models: list[Model]) -> list[str | Markup]:
    """Images of a domain: the input, masked, and reconstructed by each model."""
    stored = source.load(ids, input_shape(models[0].mae.encoder))
    pixels = stored.take(slice(None))
    shown = {"Input": pixels}
    for model in models:
        found = model.reconstruct(pixels, stored)
        shown.setdefault("Masked", found.masked)
        shown[model.label] = found.filled
    pictures = [montage(p, COLUMNS, f"{what}: {name or 'images'}") for what, p in shown.items()]
    return [name, *pictures]
