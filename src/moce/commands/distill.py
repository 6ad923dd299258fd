"""moce distill: a small student of a backbone, by matching features on unlabeled images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moce.commands.monitoring import set_monitor
from moce.commands.setup import (
    changed,
    choose,
    refuse_unused,
    resolve,
    start_run,
    training_images,
)
from moce.config import DistillSettings
from moce.customization.model_card import write_card, write_with_card
from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.evaluation.monitor import Dense
from moce.models.encoder import EncoderSpec, input_channels, input_size
from moce.models.student import Student, build_student
from moce.runs.files import write_json
from moce.runs.model import STATE, last_metrics, provenance
from moce.training.announce import announce
from moce.training.distillation import DistillObjective, size_of
from moce.training.trainer import fit
from moce.weights.export import TIMM, Model
from moce.weights.from_runs import load_backbone

DONE = "distillation.json"


@dataclass
class DistillResult:
    """run: the folder, which timm loads as local-dir:RUN; similarity: mean cosine of the pooled features
    to the teacher's, of the last logged steps; parameters: of the student.
    """

    run: Path
    similarity: float
    parameters: int
    load_it: str

    def summary(self) -> str:
        return (
            f"a student of {self.parameters / 1e6:.3g} M parameters, cosine to its teacher "
            f"{self.similarity:.3f}: {self.run}\nload it:\n{self.load_it}"
        )


def run(settings: DistillSettings) -> DistillResult:
    if settings.resume and (settings.out / DONE).is_file():
        raise MoceError(f"{settings.out} is finished; use --overwrite to distill again")
    asked, device = resolve(settings)
    teacher = load_backbone(asked.backbone)
    net, spec = build_student(asked.model, asked.model_args, teacher.vit, teacher.spec)
    size = size_of(net, input_size(teacher.vit))
    width = teacher.vit.embed_dim
    student = Student(net.eval(), width, (input_channels(teacher.vit), *size)).train()
    images = training_images(asked, asked.data, teacher.vit)
    settings = choose(asked, len(images), net, device)
    objective = DistillObjective(student, size, teacher, images, settings, device)
    if isinstance(net, VisionTransformer):
        set_monitor(objective, settings, images, Dense(student, net, spec), device)
    else:
        reason = f"only plain ViTs can be measured, which {settings.model} is not"
        refuse_unused(settings, ("monitor", "monitor_every"), reason)
    start_run(settings, images)
    announce(objective, settings, device, spec.name, teacher.vit, changed(asked, settings))
    fit(objective, settings, device, settings.precision)
    return _save(settings, student.net.cpu().eval(), spec, size, images)


def _save(
    settings: DistillSettings,
    net: nn.Module,
    spec: EncoderSpec,
    size: tuple[int, int],
    images: ImageDataset,
) -> DistillResult:
    """Write the student as a folder of timm, with its card; distillation.json is last."""
    last = last_metrics(settings.out)
    similarity = 1 - last["pooled"]
    facts = [
        f"teacher: {Path(settings.backbone).name}",
        f"trained on: {len(images)} unlabeled images",
        f"mean cosine of pooled features to the teacher's: {similarity:.3f}",
    ]
    title = f"{spec.name}, distilled by moce from {Path(settings.backbone).name}"
    if isinstance(net, VisionTransformer):
        load_it = write_with_card(settings.out, "timm", Model(spec, net), title, facts)
    else:
        load_it = _write_other(settings.out, net, spec, size, title, facts)
    parameters = sum(weight.numel() for weight in net.parameters())
    content: dict[str, Any] = {"similarity": similarity, "parameters": parameters}
    write_json(settings.out / DONE, {**content, **provenance()})
    shutil.rmtree(settings.out / STATE, ignore_errors=True)  # three times the weights
    return DistillResult(settings.out, similarity, parameters, load_it)


def _write_other(
    folder: Path,
    net: Any,
    spec: EncoderSpec,
    size: tuple[int, int],
    title: str,
    facts: list[str],
) -> str:
    """A student that is no plain ViT, as timm saves its own models."""
    channels = int(spec.model_args["in_chans"])
    net.pretrained_cfg = {
        **net.pretrained_cfg,
        "input_size": (channels, *size),
        "mean": spec.mean,
        "std": spec.std,
        "num_classes": 0,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    try:
        save_for_hf(net, str(folder), model_args=dict(spec.model_args), safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot write {folder}: {error}") from None
    return write_card(folder, "timm", TIMM, (channels, *size), spec, title, facts)
