"""Settings of detection and segmentation: shared ones, those of their heads, and of predict."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from moce.config.base import (
    IMAGES,
    Count,
    Data,
    DataSettings,
    Folder,
    Fraction,
    Index,
    Positive,
    Reference,
    Settings,
)
from moce.config.facts import setting

Task = Literal["classify", "detect", "segment"]
DENSE: dict[str, tuple[str, ...]] = {"task": ("detect", "segment")}
CLASSIFY: dict[str, tuple[str, ...]] = {"task": ("classify",)}


class DenseTaskSettings(Settings):
    """What `moce finetune` needs to know to detect and to segment."""

    task: Task | None = setting(
        None,
        "what to train for: classify, detect (boxes, and masks if there are any) or segment (a class "
        "for every pixel) (default: what the labels say)",
        before="classify",
        set_by_evaluate=True,
    )
    annotations: Folder | None = setting(
        None,
        "where the boxes or masks are, if not beside the images: a COCO JSON file or a folder",
        input="file",
        used_with=DENSE,
    )
    ignore_index: Annotated[Index, Field(le=255)] | None = setting(
        None,
        "value of masks that neither trains nor counts, beside 255",
        used_with={"task": ("segment",)},
    )
    image_size: Count | None = setting(
        None,
        "side in pixels of the square that the network sees; position embeddings are resampled "
        "(default: 1024 to detect, 512 to segment)",
        used_with=DENSE,
    )
    jitter: Annotated[tuple[Positive, ...], Field(max_length=2)] = setting(
        (),
        "least and greatest factor by which images are resized before they are cropped to image_size "
        "(default: 0.1,2 to detect, 0.5,2 to segment)",
        used_with=DENSE,
    )
    window: Index = setting(
        0,
        "side in patches of the windows to which all blocks but four restrict attention (0: none); "
        "has to divide the grid of patches",
        used_with=DENSE,
    )
    masks: bool = setting(
        True,
        "learn masks, too, where the labels have them",
        before=True,
        used_with={"task": ("detect",)},
    )
    head_args: dict[str, Any] = setting(
        {},
        "of the head; detect: dim (256), scales of the pyramid ([4, 2, 1, 0.5]), anchor_scale (8, "
        "side of an anchor over the stride of its level), depth (4, convolutions), proposals (512, per "
        "image to train on); segment: kind (upernet or linear), dim (512)",
        used_with=DENSE,
    )


def _check_scales(scales: tuple[float, ...]) -> tuple[float, ...]:
    known = (4, 2, 1, 0.5)
    if not set(scales) <= set(known) or list(scales) != sorted(set(scales), reverse=True):
        raise ValueError("must be some of 4, 2, 1, 0.5, from fine to coarse")
    return scales


Scales = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_check_scales)]


class DetectorHead(Settings):
    """ViTDet's heads by default. scales: of the levels over the ViT's map, from fine to coarse."""

    dim: Annotated[Count, Field(ge=8, le=4096)] = 256
    scales: Scales = (4, 2, 1, 0.5)
    anchor_scale: Positive = 8
    depth: Annotated[Index, Field(le=16)] = 4
    proposals: Count = 512


class SegmenterHead(Settings):
    """The MAE paper's UPerNet by default."""

    kind: Literal["upernet", "linear"] = "upernet"
    dim: Annotated[Count, Field(ge=8, le=4096)] = 512


class PredictSettings(DataSettings):
    """Apply a fine-tuned model to images: COCO JSON, mask PNGs or a table of classes, and pictures."""

    files = frozenset(
        {"predictions.json", "classes.txt"}
        | {"predictions.csv", "predictions.jsonl", "predictions.parquet"}
    )
    folders = frozenset({"predicted_masks", "predicted_pictures"})

    model: Reference = setting(description="folder that moce finetune wrote", input="weights")
    data: Data = setting(description=IMAGES, input="images")
    out: Folder = setting(description="folder to write the predictions to")
    min_score: Fraction = setting(0.05, "detections with a lower score are not written")
    pictures: Index = setting(16, "images to draw the predictions into, the first ones")
    picture_score: Fraction = setting(0.5, "detections with a lower score are not drawn")
    format: Literal["csv", "jsonl", "parquet"] = setting("csv", "table of a classifier's classes")
    top_k: Count = setting(1, "most probable classes of an image that a classifier writes")
    batch_size: Count = setting(8, "images per forward pass (of a classifier 256 if not given)")
    overwrite: bool = setting(False, "replace the contents of the output folder")
