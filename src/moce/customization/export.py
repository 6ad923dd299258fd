"""Write a dense backbone as a folder that timm loads without moce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import VisionTransformer, save_for_hf

from moce.customization.selection import Choice, route_name
from moce.errors import MoceError
from moce.features import input_shape
from moce.models.encoder import EncoderSpec

MOST_CLUSTERS = 12  # on a card


def write_timm_folder(folder: Path, vit: VisionTransformer, spec: EncoderSpec, **head: Any) -> None:
    """Write config.json and model.safetensors, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Pooling: the mean of the patch tokens after the final norm, moce's own feature, unless `head`
    (num_classes, global_pool, fc_norm: model arguments of a ViT with a head) says otherwise.
    """
    model = pooled(vit, spec, **head)
    try:
        save_for_hf(model, str(folder), safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise MoceError(f"cannot write {folder}: {error}") from None


def pooled(vit: VisionTransformer, spec: EncoderSpec, **head: Any) -> VisionTransformer:
    """A ViT of timm's with the weights of `vit`, its pooling and head, and how its images are made."""
    model = spec.build(**{"global_pool": "avg", "fc_norm": False, **head})
    model.load_state_dict(vit.state_dict())
    cfg: Any = model.pretrained_cfg
    kept = {k: v for k, v in cfg.items() if not k.startswith("test_")}
    how = {
        "pool_size": None,
        "input_size": input_shape(model),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    model.pretrained_cfg = {**kept, **how}  # type: ignore[assignment]
    return model


def facts_of(choice: Choice) -> list[str]:
    """What a card says of a choice for a task."""
    return [
        f"strategy: {choice.strategy}",
        f"route: {route_name(choice.route)} ({choice.share:.0%} of the task's images)",
        f"clusters: {clusters_of(choice)}",
        f"similarity to the clusters: {choice.similarity:.3f} "
        f"(training images: {choice.training_similarity:.3f})",
    ]


def clusters_of(choice: Choice) -> str:
    """The clusters with most images, as 3 (120 images), 7 (80 images), ..."""
    counts = enumerate(choice.cluster_histogram)
    most = sorted(((n, c) for c, n in counts if n), key=lambda pair: (-pair[0], pair[1]))
    clusters = ", ".join(f"{cluster} ({count} images)" for count, cluster in most[:MOST_CLUSTERS])
    more = len(most) - MOST_CLUSTERS
    return clusters + (f" and {more} more" if more > 0 else "")
