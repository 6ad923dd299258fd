"""Low-rank adapters (LoRA) in the blocks of a frozen ViT, by peft.

peft changes the ViT in place, so that training, checkpoints and validation see an ordinary network.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moce.config import FinetuneSettings
from moce.errors import MoceError
from moce.runs.files import write_json, write_tensors
from moce.training.freeze import HEAD

ADAPTER = "adapter"  # the folder in a run, for peft.PeftModel.from_pretrained
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names


def check_lora(settings: FinetuneSettings, vit: VisionTransformer) -> None:
    """Raise MoceError if peft is not installed, or the ViT has nothing to adapt."""
    if find_spec("peft") is None:
        raise MoceError("peft is not installed: pip install 'moce[lora]', or leave out --lora")
    if not linears(vit, settings.lora_targets):
        parts = " or ".join(settings.lora_targets)
        raise MoceError(
            f"--lora {settings.lora}: the blocks of {settings.backbone} have no linear layers in {parts}"
        )


def linears(vit: VisionTransformer, parts: tuple[str, ...]) -> list[str]:
    """Names of the linear layers in these parts (attn, mlp) of the blocks."""
    return [
        name
        for name, module in vit.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and name.split(".")[2] in parts
    ]


def add_lora(vit: VisionTransformer, settings: FinetuneSettings) -> Any:
    """Freeze a classifier but for its head, and add adapters, in place; returns peft's PeftModel.

    Their first factors are drawn from torch's generator, the second are 0: the outputs are as before.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    assert settings.lora is not None
    config = LoraConfig(
        r=settings.lora,
        lora_alpha=settings.lora_alpha or settings.lora,
        target_modules=linears(vit, settings.lora_targets),
        modules_to_save=list(HEAD),
    )
    return get_peft_model(vit, config)


def write_adapter(folder: Path, adapted: Any, backbone: str) -> None:
    """Write the adapters and the head of a backbone as peft does, each file whole or not at all."""
    from peft import get_peft_model_state_dict

    folder.mkdir(exist_ok=True)
    config = adapted.peft_config["default"]
    values = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": backbone}
    values["target_modules"] = sorted(config.target_modules)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, values)


def merge(adapted: Any) -> None:
    """Add the adapters' products to the weights they belong to: the ViT is a plain one again."""
    adapted.merge_and_unload()
