"""ONNX: an encoder as a file that ONNX Runtime and other engines run. Needs the extra [onnx]."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec, encode_tokens, input_shape, pool_tokens
from moce.runs.files import atomic, write_json

MODEL, PREPROCESSING = "model.onnx", "preprocessing.json"


class _Features(nn.Module):
    """Normalized images [b, c, h, w] to features [b, d] and tokens [b, prefix + patches, d]."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = encode_tokens(self.vit, images)
        return pool_tokens(self.vit, tokens, "mean"), tokens


class _Logits(nn.Module):
    """Normalized images [b, c, h, w] to logits [b, classes] and features [b, d] below the head."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = pool_tokens(self.vit, encode_tokens(self.vit, images), "mean")
        return self.vit.head(features), features


def check_installed() -> None:
    """Raise MoceError if the packages that torch's exporter needs are not installed."""
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise MoceError("the onnx format needs more packages: pip install 'moce[onnx]'") from None


def write(
    folder: Path, vit: VisionTransformer, spec: EncoderSpec, classes: Sequence[str] | None = None
) -> None:
    """Write model.onnx (any batch size, float32) and preprocessing.json.

    classes: names of a fine-tuned model's; it gives logits and features, others features and tokens.
    """
    check_installed()
    shape, plain = input_shape(vit), copy.deepcopy(vit).cpu().float()
    module = (_Features(plain) if classes is None else _Logits(plain)).eval()
    with atomic(folder / MODEL) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, *shape),),
            str(temporary),
            input_names=["images"],
            output_names=["features", "tokens"] if classes is None else ["logits", "features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    preprocessing: dict[str, Any] = {"input_size": list(shape), "mean": spec.mean, "std": spec.std}
    if classes is not None:
        preprocessing["classes"] = list(classes)
    write_json(folder / PREPROCESSING, preprocessing)
