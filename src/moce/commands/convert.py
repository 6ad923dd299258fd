"""moce convert: weights in any format that moce reads, to one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.commands.setup import check_file, refuse_unused
from moce.config import ConvertSettings
from moce.errors import counted
from moce.runs.files import make_folder
from moce.runtime.progress import log
from moce.weights.build import build_encoder, build_mae, to_mae_weights
from moce.weights.formats import moce as own
from moce.weights.from_runs import load_mae, moce_run
from moce.weights.read import SAFETENSORS, file_of, read_raw
from moce.weights.resolve import check_arguments, overrides_of, refuse_given
from moce.weights.types import MODEL_CONFIG, MAEWeights
from moce.weights.unsafe_pickle import read_trusted


@dataclass
class ConvertResult:
    """file: the file written; tensors: their number; decoder: whether some are a decoder's."""

    file: Path
    tensors: int
    decoder: bool

    def summary(self) -> str:
        parts = "encoder and decoder" if self.decoder else "encoder"
        return f"{parts}, {counted(self.tensors, 'tensor')}: {self.file}"


def run(settings: ConvertSettings) -> ConvertResult:
    out, inputs = settings.out, [settings.weights]
    check_file(out, inputs, f"weights{SAFETENSORS}", overwrite=settings.overwrite)
    weights, notes = _checked(settings)
    for note in notes:
        log(note)
    make_folder(out.parent)
    own.write(out, weights)
    count = len(weights.encoder) + len(weights.decoder)
    return ConvertResult(out, count, bool(weights.decoder))


def _checked(settings: ConvertSettings) -> tuple[MAEWeights, list[str]]:
    """The weights as a model takes them, by all checks of --init, and notes on them."""
    path, run = settings.weights, moce_run(settings.weights)
    if run is not None and (run / MODEL_CONFIG).is_file():
        run = None  # a fine-tuned model: a folder of timm
    pickled = run is None and path.exists() and file_of(path).suffix != SAFETENSORS
    if path.exists() and not pickled:
        reason = f"{path} is read without pickle, which only files such as .pth may need"
        refuse_unused(settings, {"trust_pickle"}, reason)
    if run is not None:
        refuse_given(settings, f"run {run}")
        run_spec, mae = load_mae(run)
        return own.weights_of(run_spec.encoder, mae.encoder, mae), []
    check_arguments(settings.model_args)
    read = read_trusted if settings.trust_pickle else read_raw
    weights = to_mae_weights(read(path, settings.weights_key))
    if weights.decoder:
        refuse_given(settings, f"decoder in {path}", {"decoder"})
        spec, mae, notes = build_mae(weights, overrides_of(settings))
        return _stated(own.weights_of(spec.encoder, mae.encoder, mae), weights), notes
    encoder, vit, notes = build_encoder(weights, overrides_of(settings))
    return _stated(own.weights_of(encoder, vit), weights), notes


def _stated(made: MAEWeights, weights: MAEWeights) -> MAEWeights:
    """The weights as built, without values that their file does not state."""
    for name in ("mean", "std", "decoder_heads", "mask_ratio", "norm_pix"):
        if getattr(weights, name) is None:
            setattr(made, name, None)
    return made
