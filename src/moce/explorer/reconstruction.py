"""One image, masked, and filled in by the MAE, by the chosen experts and by the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moce.customization.bank import Bank
from moce.customization.selection import Choice, route_name
from moce.data.load import try_decode
from moce.data.readers.sample import Sample
from moce.errors import MoceError
from moce.inference.reconstructions import reconstruct
from moce.models.encoder import EncoderSpec, fit_of, input_channels, input_shape
from moce.models.mae import MAE
from moce.runs.model import read_config
from moce.weights.from_runs import load_mae

MOST_ROUTES = 8  # beside the chosen one: those of most training images


@dataclass
class Picture:
    """label: whose it is; pixels: [c, h, w] uint8; error: of the removed patches, None of an input."""

    label: str
    pixels: Tensor
    error: float | None = None


@dataclass
class Reconstructor:
    """The models of a run that fill in images. mae: (spec, model) of the MAE; bank: of a MoCE run.

    note: what is left out, and why.
    """

    bank: Bank | None = None
    mae: tuple[EncoderSpec, MAE] | None = None
    note: str = ""

    @classmethod
    def of_run(cls, run: Path, bank: Bank | None) -> Reconstructor:
        """With the MAE that the run was made from, if it is still there."""
        origin = read_config(run).get("mae")
        if not origin:
            return cls(bank, note="the run does not say which MAE it was made from")
        places = (Path(origin), run.resolve().parent / Path(origin).name)  # it may have moved
        for place in places:
            try:
                spec, mae = load_mae(place)
            except MoceError as error:
                note = f"without the MAE: {error}"
                continue
            if bank is not None and not _same_geometry(mae, bank.model.mae):
                return cls(bank, note=f"without the MAE {place}: its images or mask differ")
            return cls(bank, (spec.encoder, mae.eval()))
        return cls(bank, note=note)

    def models(self, choice: Choice | None) -> Iterator[tuple[str, EncoderSpec, MAE]]:
        """What fills in an image, with a label: the MAE, the choice, other routes. One at a time in memory."""
        if self.mae is not None:
            yield "MAE", *self.mae
        if self.bank is None or choice is None:
            return
        spec, bank = self.bank.encoder_spec, self.bank
        yield f"chosen: {name_of(choice)}", spec, bank.mae(choice)
        own = choice.route if choice.strategy == "route" else None
        for route in [route for route in bank.routes if route != own][:MOST_ROUTES]:
            yield f"route {route_name(route)}", spec, bank.mae(bank.route_choice(route))

    def fill_in(self, sample: Sample, choice: Choice | None) -> list[Picture]:
        """The image, masked, and filled in by each model. Raises MoceError if it cannot be read."""
        pictures: list[Picture] = []
        for label, spec, mae in self.models(choice):
            if not pictures:
                pixels = _read(sample, mae)
                pictures.append(Picture("image", pixels[0]))
            found = reconstruct(mae.eval(), spec, pixels)
            if len(pictures) == 1:
                pictures.append(Picture("masked", found.masked[0]))
            pictures.append(Picture(label, found.filled[0], found.error))
        return pictures


def _read(sample: Sample, mae: MAE) -> Tensor:
    """An image as a model takes it, [1, c, h, w] uint8."""
    vit = mae.encoder
    pixels, reasons = try_decode([sample], input_channels(vit), fit_of(vit))
    if reasons:
        raise MoceError(f"cannot read {sample.id}: {reasons[0]}")
    return pixels


def name_of(choice: Choice) -> str:
    """The experts of a choice as users name them: route 2-0, merge, generalist."""
    return f"route {route_name(choice.route)}" if choice.strategy == "route" else choice.strategy


def _same_geometry(first: MAE, second: MAE) -> bool:
    """Whether two models take the same images under the same mask."""
    one, other = (
        (input_shape(mae.encoder), mae.patch_size, mae.mask_ratio) for mae in (first, second)
    )
    return one == other
