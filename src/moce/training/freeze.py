"""Leave the first parts of a ViT untrained."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from moce.errors import MoceError, counted

HEAD = ("fc_norm", "head")


def freeze_first(vit: VisionTransformer, freeze: str | int) -> None:
    """Freeze the embeddings and the first `freeze` blocks; "backbone": all but a classifier's head.

    Raises MoceError if the network has fewer blocks.
    """
    count, depth = blocks_to_freeze(vit, freeze), len(vit.blocks)
    for name, parameter in vit.named_parameters():
        part, *rest = name.split(".")
        first = int(rest[0]) < count if part == "blocks" else count > 0
        if first and part not in HEAD and (part != "norm" or count == depth):
            parameter.requires_grad_(False)


def blocks_to_freeze(vit: VisionTransformer, freeze: str | int) -> int:
    """How many blocks `freeze` names. Raises MoceError if the network has fewer."""
    depth = len(vit.blocks)
    count = depth if freeze == "backbone" else int(freeze)
    if count > depth:
        raise MoceError(f"--freeze {count}: the backbone has {counted(depth, 'block')}")
    return count
