"""Models as folders for timm, Transformers, torch and ONNX."""

from __future__ import annotations

from collections.abc import Sequence
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
from moce.weights.formats.timm import head_args, write_timm_folder

ARCHITECTURE = "architecture.json"


@dataclass
class Model:
    """An encoder to export, and the masked autoencoder it belongs to if that is exported too.

    classes: names of a fine-tuned model's, whose head `vit` then has; multi_label: whether an image
    can have several of them.
    """

    spec: EncoderSpec
    vit: VisionTransformer
    mae: MAE | None = None
    classes: Sequence[str] | None = None
    multi_label: bool = False


def check_format(kind: Format, model: Model) -> None:
    """Raise MoceError, with the reason, if a format does not support the model.

    Called before an output folder is emptied.
    """
    if kind == "transformers" and model.mae is not None:
        transformers_export.check_mae(model.mae)
    elif kind == "transformers" and model.classes is not None:
        transformers_export.check_classifier(model.vit)
    elif kind == "transformers":
        transformers_export.check_vit(model.vit, "ViTModel")
    elif kind == "onnx":
        onnx.check_installed()


def write_model_folder(folder: Path, kind: Format, model: Model) -> str:
    """Write a model in one of the formats.

    Returns the Python that loads it from THIS_FOLDER. Raises MoceError if it cannot be written or
    the format does not support it.
    """
    classifies = model.classes is not None
    if kind == "timm":
        write_timm_folder(folder, model.vit, model.spec, model.classes)
        return TIMM_CLASSIFIER if classifies else TIMM
    if kind == "transformers" and model.mae is not None:
        transformers_export.write_mae(folder, model.mae, model.spec)
        return TRANSFORMERS_MAE
    if kind == "transformers" and model.classes is not None:
        transformers_export.write_classifier(
            folder, model.vit, model.spec, model.classes, model.multi_label
        )
        return TRANSFORMERS_CLASSIFIER
    if kind == "transformers":
        transformers_export.write_vit(folder, model.vit, model.spec)
        return TRANSFORMERS_VIT
    if kind == "torch":
        weights = own.weights_of(model.spec, model.vit, model.mae)
        about = own.describe(weights)
        if classifies:
            about["model_args"] = {**model.spec.model_args, **head_args(model.vit)}
            about["classes"] = list(model.classes or ())
        own.write(folder / WEIGHTS, weights)
        write_json(folder / ARCHITECTURE, about)
        return TORCH_CLASSIFIER if classifies else TORCH
    onnx.write(folder, model.vit, model.spec, model.classes)
    return ONNX_CLASSIFIER if classifies else ONNX


TIMM = """import timm
model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
features = model(images)  # the mean of the patch tokens; num_classes=N adds a new head"""

TIMM_CLASSIFIER = """import timm
model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
logits = model(images)  # classes by number: label_names in config.json"""

TRANSFORMERS_CLASSIFIER = """from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("THIS_FOLDER")
logits = model(pixel_values=images).logits  # classes by number: model.config.id2label"""

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

TORCH_CLASSIFIER = """import json
import timm
from safetensors.torch import load_file
config = json.load(open("THIS_FOLDER/architecture.json", encoding="utf-8"))
model = timm.create_model(config["name"], **config["model_args"]).eval()
model.load_state_dict(load_file("THIS_FOLDER/model.safetensors"))
logits = model(images)  # classes by number: config["classes"]"""

ONNX_CLASSIFIER = """import onnxruntime
session = onnxruntime.InferenceSession("THIS_FOLDER/model.onnx")
logits, features = session.run(None, {"images": images.numpy()})
# classes by number: preprocessing.json"""

ONNX = """import onnxruntime
session = onnxruntime.InferenceSession("THIS_FOLDER/model.onnx")
features, tokens = session.run(None, {"images": images.numpy()})"""
