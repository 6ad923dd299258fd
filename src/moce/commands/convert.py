"""moce convert: weights in any format that moce reads, to one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.commands.setup import check_file, refuse_unused
from moce.config import ConvertSettings
from moce.runs.files import make_folder
from moce.runtime.progress import log
from moce.weights.build import read_weights, to_mae_weights
from moce.weights.formats import moce as own
from moce.weights.from_runs import load_mae
from moce.weights.resolve import moce_run
from moce.weights.types import MAEWeights
from moce.weights.unsafe_pickle import read_trusted

SUFFIX = ".safetensors"


@dataclass
class ConvertResult:
    """file: the file written; tensors: their number; decoder: whether some are a decoder's."""

    file: Path
    tensors: int
    decoder: bool

    def summary(self) -> str:
        parts = "encoder and decoder" if self.decoder else "encoder"
        return f"{parts}, {self.tensors} tensors: {self.file}"


def run(settings: ConvertSettings) -> ConvertResult:
    out, inputs = settings.out, [settings.weights]
    check_file(out, inputs, f"weights{SUFFIX}", overwrite=settings.overwrite)
    weights = _read(settings)
    for note in weights.notes:
        log(note)
    make_folder(out.parent)
    own.write(out, weights)
    count = len(weights.encoder) + len(weights.decoder)
    return ConvertResult(out, count, bool(weights.decoder))


def _read(settings: ConvertSettings) -> MAEWeights:
    run = moce_run(settings.weights)
    pickled = run is None and settings.weights.is_file() and settings.weights.suffix != SUFFIX
    if settings.weights.exists() and not pickled:
        reason = (
            f"{settings.weights} is read without pickle, which only files such as .pth may need"
        )
        refuse_unused(settings, {"trust_pickle"}, reason)
    if run is not None:
        spec, mae = load_mae(run)
        return own.weights_of(spec.encoder, mae.encoder, mae)
    if settings.trust_pickle and pickled:
        return to_mae_weights(read_trusted(settings.weights))
    return read_weights(settings.weights)
