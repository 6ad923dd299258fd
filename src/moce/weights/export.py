"""Models as folders for timm, Transformers, torch and ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from moce.config.base import Format
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_json
from moce.runs.model import WEIGHTS
from moce.weights.formats import moce as own
from moce.weights.formats import onnx, transformers_export
from moce.weights.formats.timm import write_timm_folder

ARCHITECTURE = "architecture.json"


@dataclass
class Model:
    """An encoder to export, and the masked autoencoder it belongs to if that is exported too."""

    spec: EncoderSpec
    vit: VisionTransformer
    mae: MAE | None = None


def check_format(kind: Format, model: Model) -> None:
    """Raise MoceError, with the reason, if a format does not support the model.

    Called before an output folder is emptied.
    """
    if kind == "transformers" and model.mae is not None:
        transformers_export.check_mae(model.mae)
    elif kind == "transformers":
        transformers_export.check_vit(model.vit, "ViTModel")
    elif kind == "onnx":
        onnx.check_installed()


def write_model_folder(folder: Path, kind: Format, model: Model) -> str:
    """Write a model in one of the formats.

    Returns the Python that loads it from THIS_FOLDER. Raises MoceError if it cannot be written or
    the format does not support it.
    """
    if kind == "timm":
        write_timm_folder(folder, model.vit, model.spec)
        return TIMM
    if kind == "transformers" and model.mae is not None:
        transformers_export.write_mae(folder, model.mae, model.spec)
        return TRANSFORMERS_MAE
    if kind == "transformers":
        transformers_export.write_vit(folder, model.vit, model.spec)
        return TRANSFORMERS_VIT
    if kind == "torch":
        weights = own.weights_of(model.spec, model.vit, model.mae)
        own.write(folder / WEIGHTS, weights)
        write_json(folder / ARCHITECTURE, own.describe(weights))
        return TORCH
    onnx.write(folder, model.vit, model.spec)
    return ONNX


TIMM = """import timm
model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
features = model(images)  # the mean of the patch tokens; num_classes=N adds a new head"""

TRANSFORMERS_MAE = """from transformers import ViTMAEForPreTraining
model = ViTMAEForPreTraining.from_pretrained("THIS_FOLDER")
loss = model(pixel_values=images).loss"""

TRANSFORMERS_VIT = """from transformers import ViTModel
model = ViTModel.from_pretrained("THIS_FOLDER", add_pooling_layer=False)
features = model(pixel_values=images).last_hidden_state[:, 1:].mean(dim=1)"""

TORCH = """import json
import timm
from safetensors.torch import load_file
config = json.load(open("THIS_FOLDER/architecture.json", encoding="utf-8"))
options = dict(num_classes=0, global_pool="avg", fc_norm=False)
model = timm.create_model(config["name"], **config["model_args"], **options).eval()
tensors = load_file("THIS_FOLDER/model.safetensors")  # a decoder has the names of facebookresearch/mae
model.load_state_dict({name: tensors[name] for name in model.state_dict()})
features = model(images)  # the mean of the patch tokens"""

ONNX = """import onnxruntime
session = onnxruntime.InferenceSession("THIS_FOLDER/model.onnx")
features, tokens = session.run(None, {"images": images.numpy()})"""
