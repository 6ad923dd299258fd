"""The formats that a backbone can be handed out in: what writes each, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_json, write_text
from moce.runs.model import WEIGHTS
from moce.weights.formats import moce as own
from moce.weights.formats import onnx as onnx_file
from moce.weights.formats import transformers_vit
from moce.weights.formats.timm import write_timm_folder

ARCHITECTURE = "architecture.json"


@dataclass
class Model:
    """An encoder, how to build it, and the masked autoencoder it is part of, if it is to go along."""

    spec: EncoderSpec
    vit: VisionTransformer
    mae: MAE | None = None


def _write_timm(folder: Path, model: Model) -> str:
    write_timm_folder(folder, model.vit, model.spec)
    return """import timm
model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
features = model(images)  # the mean of the patch tokens; num_classes=N adds a new head"""


def _write_transformers(folder: Path, model: Model) -> str:
    if model.mae is not None:
        transformers_vit.write_mae(folder, model.mae, model.spec)
        return """from transformers import ViTMAEForPreTraining
model = ViTMAEForPreTraining.from_pretrained("THIS_FOLDER")
loss = model(pixel_values=images).loss"""
    transformers_vit.write_vit(folder, model.vit, model.spec)
    return """from transformers import ViTModel
model = ViTModel.from_pretrained("THIS_FOLDER", add_pooling_layer=False)
features = model(pixel_values=images).last_hidden_state[:, 1:].mean(dim=1)"""


def _write_torch(folder: Path, model: Model) -> str:
    weights = own.of_model(model.spec, model.vit, model.mae)
    own.write(folder / WEIGHTS, weights)
    write_json(folder / ARCHITECTURE, own.describe(weights))
    return """import json
import timm
from safetensors.torch import load_file
said = json.load(open("THIS_FOLDER/architecture.json", encoding="utf-8"))
options = dict(num_classes=0, global_pool="avg", fc_norm=False)
model = timm.create_model(said["name"], **said["model_args"], **options).eval()
tensors = load_file("THIS_FOLDER/model.safetensors")  # a decoder has the names of facebookresearch/mae
own = model.state_dict()
model.load_state_dict({name: tensors[name] for name in own})
features = model(images)  # the mean of the patch tokens"""


def _write_onnx(folder: Path, model: Model) -> str:
    onnx_file.write(folder, model.vit, model.spec)
    return """import onnxruntime
session = onnxruntime.InferenceSession("THIS_FOLDER/model.onnx")
features, tokens = session.run(None, {"images": images.numpy()})"""


# Each writes a folder and returns the Python that loads it.
FORMATS: dict[str, Callable[[Path, Model], str]] = {
    "timm": _write_timm,
    "transformers": _write_transformers,
    "torch": _write_torch,
    "onnx": _write_onnx,
}


def check_format(kind: str, model: Model) -> None:
    """Raise MoceError, naming the part, if a format has no room for part of the model.

    Called before an output folder is emptied for it.
    """
    if kind == "transformers" and model.mae is not None:
        transformers_vit.check_mae(model.mae)
    elif kind == "transformers":
        transformers_vit.check_vit(model.vit, "ViTModel")
    elif kind == "onnx":
        onnx_file.check_installed()


def write_model_folder(folder: Path, kind: str, model: Model, title: str, facts: list[str]) -> str:
    """Write a model as `kind` with a README that says what it is; returns how to load it."""
    snippet = FORMATS[kind](folder, model)
    spec = model.spec
    lines = [
        f"# {title}",
        "",
        *(f"- {fact}" for fact in facts),
        f"- format: {kind}",
        f"- images: {model.vit.in_chans} channels of {'x'.join(map(str, model.vit.patch_embed.img_size))} "
        f"pixels from 0 to 1, less {list(spec.mean)}, over {list(spec.std)}",
        "",
        "```python",
        snippet,
        "```",
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
    return snippet.replace("THIS_FOLDER", str(folder))
