"""moce predict: a fine-tuned model applied to images of any source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.commands import predict_classes
from moce.commands.setup import prepare, refuse_unused
from moce.config import PredictSettings, expand
from moce.errors import MoceError, counted
from moce.runs.folder import check_folder
from moce.runs.model import describe_kind, read_info


@dataclass
class PredictResult:
    """out: the folder; task: classify, detect or segment; images: predicted; skipped: unreadable."""

    out: Path
    task: str
    images: int
    skipped: int

    def summary(self) -> str:
        unread = f" ({self.skipped} unreadable)" if self.skipped else ""
        return f"predicted {counted(self.images, 'image')}{unread}: {self.out}"


def run(settings: PredictSettings) -> PredictResult:
    model = expand(Path(settings.model))
    kind = read_info(model)["kind"]
    check_folder(settings.out, overwrite=settings.overwrite, inputs=[("model", model)])
    device, precision = prepare(settings)
    if kind == "classifier":
        counts = predict_classes.run(settings, model, device, precision)
        return PredictResult(settings.out, "classify", *counts)
    refuse_unused(settings, ("format", "top_k"), "only classifiers use them")
    from moce.dense.predictor import KINDS  # its libraries take seconds to import

    if kind not in KINDS:
        raise MoceError(f"{model} is {describe_kind(kind)}; give one of moce finetune")
    from moce.commands import predict_dense

    return PredictResult(settings.out, KINDS[kind], *predict_dense.run(settings, device, precision))
