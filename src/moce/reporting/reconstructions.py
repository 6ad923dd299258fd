"""Section 6: what the models make of images most of which they do not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moce.customization.bank import Bank
from moce.data.augment import denormalize, normalize
from moce.data.dataset import ImageDataset
from moce.data.rng import Stream, keyed_uniform
from moce.models.encoder import EncoderSpec, input_shape, patchify, put, take
from moce.models.mae import MAE, patch_statistics, unpatchify
from moce.reporting.elements import Beside, Comparison, Note, Section
from moce.reporting.images import Source, domain_of, montage, sample
from moce.reporting.load import Material, Run
from moce.weights.from_runs import load_mae

PER_DOMAIN = 4
WITHOUT_DOMAINS = 8
HIDDEN = 0.82  # gray of a removed patch, 0..1

Predict = Callable[[Tensor, Tensor, ImageDataset], tuple[Tensor, Tensor]]


@dataclass
class Painter:
    """A model that fills in removed patches.

    predict: normalized images, mask noise and the same images as they are stored, to prediction
    and removed as in `Reconstruction`.
    """

    label: str
    mae: MAE
    spec: EncoderSpec
    predict: Predict

    @property
    def geometry(self) -> tuple[object, ...]:
        """Painters with the same one take the same images with the same mask."""
        return input_shape(self.mae.encoder), self.mae.patch_size, self.mae.mask_ratio


def reconstructions_section(material: Material, banks: dict[str, Bank]) -> Section | None:
    """The section, or None if no run reconstructs. banks: of the MoCE runs, by label.

    Raises MoceError if the images cannot be loaded any more.
    """
    runs = [run for run in material.runs if run.is_mae or run.kind == "moce"]
    if not runs:
        return None
    painters = [_painter(run, banks) for run in runs]
    # The one trained last decides on image size and mask; others that differ are left out.
    fitting = [painter for painter in painters if painter.geometry == painters[-1].geometry]
    section = Section("reconstructions", "Reconstructions", _lead(fitting))
    source = material.source(str(runs[-1].config.get("data")))
    items = [_comparison(name, ids, source, fitting) for name, ids in _groups(source)]
    section.blocks.append(Beside(items))
    odd = ", ".join(painter.label for painter in painters if painter not in fitting)
    if odd:
        section.blocks.append(Note(f"Left out, for another image size or mask: {odd}."))
    return section


def _lead(painters: list[Painter]) -> str:
    text = (
        "The models see the visible patches only; each picture is the prediction for the removed "
        "patches with the visible ones pasted in. MoCE's go through the experts of the image's "
        "cluster."
    )
    if any(painter.mae.norm_pix for painter in painters):
        text += (
            " They predict pixels normalized per patch, which is undone here with the true patch's "
            "mean and deviation: brightness and contrast of a patch are given, its drawing is not. "
            "An unsure prediction on a gray image comes out tinted, because all there is to predict "
            "of its flat patches is the offset between the channels."
        )
    return text


def _painter(run: Run, banks: dict[str, Bank]) -> Painter:
    if run.kind == "moce":
        bank = banks[run.label]

        def routed(images: Tensor, noise: Tensor, stored: ImageDataset) -> tuple[Tensor, Tensor]:
            output = bank.model(images, noise, bank.assign(stored)[0])
            return output.prediction, output.removed

        return Painter(run.label, bank.model.mae, bank.encoder_spec, routed)
    spec, mae = load_mae(run.path)
    mae.eval()

    def dense(images: Tensor, noise: Tensor, stored: ImageDataset) -> tuple[Tensor, Tensor]:
        output = mae(images, noise)
        return output.prediction, output.removed

    return Painter(run.label, mae, spec.encoder, dense)


def _groups(source: Source) -> list[tuple[str, list[str]]]:
    """Some images of each domain."""
    if not source.domains:
        return [("", sample(source.ids, WITHOUT_DOMAINS, 0))]
    members = {name: [i for i in source.ids if domain_of(i) == name] for name in source.domains}
    return [(name, sample(ids, PER_DOMAIN, 0)) for name, ids in members.items()]


@torch.no_grad()
def _comparison(name: str, ids: list[str], source: Source, painters: list[Painter]) -> Comparison:
    mae = painters[0].mae
    stored = source.load(ids, input_shape(mae.encoder))
    pixels, rows = stored.take(slice(None)), torch.arange(len(stored))
    patches = mae.encoder.patch_embed.num_patches
    noise = keyed_uniform(0, Stream.MASK, torch.zeros_like(rows), rows, patches)
    columns, shown = ["Input"], [pixels]
    for painter in painters:
        spec = painter.spec
        images = normalize(pixels, spec.mean, spec.std)
        prediction, removed = painter.predict(images, noise, stored)
        if len(columns) == 1:
            columns.append("Masked")
            shown.append(hide(pixels.float() / 255, removed, mae.patch_size))
        painted = paste(prediction, removed, images, mae.patch_size, painter.mae.norm_pix)
        columns.append(painter.label)
        shown.append(_to_bytes(denormalize(painted, spec.mean, spec.std)))
    pictures = [
        montage(pixels, 1, f"{column}: {len(pixels)} images{' of ' + name if name else ''}")
        for column, pixels in zip(columns, shown, strict=True)
    ]
    return Comparison(name, columns, pictures)


def paste(
    prediction: Tensor, removed: Tensor, images: Tensor, patch: tuple[int, int], norm_pix: bool
) -> Tensor:
    """Images with their removed patches replaced by the prediction, [b, c, h, w].

    prediction: [b, m, p*p*c]; removed: [b, m], their places; images: [b, c, h, w], normalized.
    With norm_pix the prediction is scaled back by the true patch's mean and deviation.
    """
    patches = patchify(images, patch)
    if norm_pix:
        mean, deviation = patch_statistics(take(patches, removed))
        prediction = prediction * deviation + mean
    pasted = put(patches, removed, prediction.float())
    return unpatchify(pasted, patch, (images.shape[2], images.shape[3]))


def hide(images: Tensor, removed: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images 0..1 [b, c, h, w] with removed patches gray, as uint8."""
    patches = patchify(images, patch)
    gray = torch.full_like(take(patches, removed), HIDDEN)
    hidden = put(patches, removed, gray)
    return _to_bytes(unpatchify(hidden, patch, (images.shape[2], images.shape[3])))


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
