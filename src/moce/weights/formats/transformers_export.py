"""Folders for Transformers' ViTModel, ViTMAEForPreTraining and BeitForImageClassification.

The names are those that 4.x writes, which 5.x loads too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from moce.errors import MoceError
from moce.models.encoder import RGB, EncoderSpec
from moce.models.mae import MAE
from moce.runs.files import write_json, write_tensors
from moce.runs.model import WEIGHTS
from moce.weights.formats import mae as facebook
from moce.weights.formats.transformers import EPS
from moce.weights.read import PROCESSOR
from moce.weights.types import MODEL_CONFIG, Tensors, rename

BICUBIC = 3  # Pillow's number
# Applied in this order.
RENAMES = (
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(?=decoder_|mask_token)", "decoder."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


BEIT_RENAMES = (
    (r"^fc_norm\.", "pooler.layernorm."),
    (r"^head\.", "classifier."),
    (r"\.ls([12])\.gamma$", r".lambda_\1"),
)


def write_vit(folder: Path, vit: VisionTransformer, spec: EncoderSpec) -> None:
    """A folder for `ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)`.

    Raises MoceError if ViTModel does not support the encoder.
    """
    check_vit(vit, "ViTModel")
    config = {"architectures": ["ViTModel"], "model_type": "vit", **_config(vit)}
    _write(folder, config, vit, spec, _renamed(dict(vit.state_dict())))


def write_mae(folder: Path, mae: MAE, spec: EncoderSpec) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained(FOLDER)`.

    Raises MoceError if ViTMAEForPreTraining does not support the model.
    """
    check_mae(mae)
    block: Any = mae.decoder.blocks[0]
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_config(mae.encoder),
        "decoder_hidden_size": mae.decoder.embed.out_features,
        "decoder_num_hidden_layers": len(mae.decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": mae.mask_ratio,
        "norm_pix_loss": mae.norm_pix,
    }
    named = facebook.join(dict(mae.encoder.state_dict()), dict(mae.decoder.state_dict()))
    tensors = {
        name if name.startswith("decoder.") else f"vit.{name}": value
        for name, value in _renamed(named).items()
    }
    _write(folder, config, mae.encoder, spec, tensors)


def write_classifier(
    folder: Path,
    vit: VisionTransformer,
    spec: EncoderSpec,
    classes: Sequence[str],
    multi_label: bool = False,
) -> None:
    """A folder for `AutoModelForImageClassification.from_pretrained(FOLDER)`.

    ViTForImageClassification reads the class token. BEiT with absolute positions is the same network
    with the head that was trained: a norm of the mean of the patch tokens. It has no bias for keys,
    which softmax ignores: it adds the same to all keys' scores of a query. Raises MoceError if BEiT
    does not support the model.
    """
    check_classifier(vit)
    block: Any = vit.blocks[0]
    scaled = hasattr(block.ls1, "gamma")
    problem = "multi_label_classification" if multi_label else "single_label_classification"
    config = {
        "architectures": ["BeitForImageClassification"],
        "model_type": "beit",
        **_config(vit),
        "layer_norm_eps": EPS,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
        "layer_scale_init_value": 0.1 if scaled else 0.0,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": problem,
    }
    tensors: Tensors = {}
    for name, value in _renamed(dict(vit.state_dict())).items():
        if not name.endswith("attention.key.bias"):
            renamed = rename(name, BEIT_RENAMES)
            head = renamed.startswith("classifier.")
            tensors[renamed if head else f"beit.{renamed}"] = value
    _write(folder, config, vit, spec, tensors)


def check_mae(mae: MAE) -> None:
    """Raise MoceError if ViTMAEForPreTraining does not support the model."""
    vit = mae.encoder
    check_vit(vit, "ViTMAEForPreTraining")
    (height, width), patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if height != width or patch[0] != patch[1]:
        raise MoceError(
            f"ViTMAE takes square images and patches, not {height}x{width} in patches of "
            f"{patch[0]}x{patch[1]}; export it as torch"
        )
    norm: Any = vit.norm
    if norm.eps != EPS:
        raise MoceError(f"ViTMAE has one eps for all norms; here they differ ({norm.eps}, {EPS})")


def check_classifier(vit: VisionTransformer) -> None:
    """Raise MoceError if BeitForImageClassification does not support a fine-tuned model."""
    height, width = vit.patch_embed.img_size
    if height != width:
        raise MoceError(f"BEiT takes square images, not {height}x{width}; export it as timm")
    check_vit(vit, "BeitForImageClassification", classifier=True)


def check_vit(vit: VisionTransformer, target: str, classifier: bool = False) -> None:
    """Raise MoceError, with the reason, if the class `target` of Transformers lacks a layer."""
    block: Any = vit.blocks[0]
    norm: Any = vit.fc_norm if classifier else vit.norm
    unsupported = {
        "registers": vit.reg_token is not None,
        "no class token": vit.cls_token is None,
        "positions for patches only": vit.no_embed_class,
        "LayerScale": hasattr(block.ls1, "gamma") and not classifier,
        "normed queries and keys": hasattr(block.attn.q_norm, "weight"),
        f"an FFN of type {type(block.mlp).__name__}": type(block.mlp).__name__ != "Mlp",
        "a norm before the blocks": hasattr(vit.norm_pre, "weight"),
        "no norm after the blocks": not hasattr(norm, "bias"),
        "queries without bias": classifier and block.attn.qkv.bias is None,
        "projections without bias": block.attn.proj.bias is None or block.mlp.fc1.bias is None,
        "an activation that is not GELU": type(getattr(block.mlp, "act", None)).__name__ != "GELU",
    }
    found = [name for name, there in unsupported.items() if there]
    if found:
        raise MoceError(
            f"{target} of Transformers does not support this encoder: {', '.join(found)}; "
            "export it as timm, torch or onnx"
        )


def _config(vit: VisionTransformer) -> dict[str, Any]:
    block: Any = vit.blocks[0]
    norm: Any = vit.norm
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": getattr(norm, "eps", EPS),
        "image_size": _side(vit.patch_embed.img_size),
        "patch_size": _side(vit.patch_embed.patch_size),
        "num_channels": vit.in_chans,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _side(size: tuple[int, int]) -> int | list[int]:
    """One number for a square, else [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def _write(
    folder: Path,
    config: dict[str, Any],
    vit: VisionTransformer,
    spec: EncoderSpec,
    tensors: Tensors,
) -> None:
    height, width = vit.patch_embed.img_size
    # As moce itself: the shorter side is resized, and the middle cropped. ViT's own processor would
    # squash images that are not square.
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": vit.in_chans == RGB,
        "do_resize": True,
        "size": {"shortest_edge": max(height, width)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    write_json(folder / MODEL_CONFIG, config)
    write_json(folder / PROCESSOR, processor)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def _renamed(tensors: Tensors) -> Tensors:
    """facebookresearch/mae's names to those of Transformers, queries, keys and values split."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[rename(name.replace(".qkv.", f".{part}."), RENAMES)] = third
        else:
            renamed[rename(name, RENAMES)] = value
    return renamed
