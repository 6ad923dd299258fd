"""Settings of the verbs on backbones and labeled tasks: embed, probe, finetune and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moce.config.base import (
    IMAGES,
    LABELED,
    Count,
    Data,
    DataSettings,
    Folder,
    Fraction,
    Index,
    Metric,
    NonNegative,
    OpenFraction,
    Pooling,
    Positive,
    Protocol,
    Role,
    RunSettings,
    TrainingSettings,
)


class EmbedSettings(DataSettings):
    """Write one feature per image to a parquet file: columns id, label, split, embedding."""

    backbone: str = Field(
        description="customized folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: Data = Field(description=IMAGES)
    out: Folder = Field(description="file to write, FILE.parquet")
    pooling: Pooling = Field(
        "mean", description="feature: mean of patch tokens, or cls, the class token"
    )
    batch_size: Count = Field(256, description="images per forward pass")
    overwrite: bool = Field(False, description="replace the output file")


class ProbeSettings(DataSettings):
    """Score frozen features on a labeled task with a linear or nearest-neighbor classifier."""

    # The defaults of solver sgd are those published for MAE's linear probe on ImageNet-1K.

    backbone: str = Field(
        description="customized folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: Data = Field(description=LABELED)
    kind: Literal["linear", "knn"] = Field("linear", description="classifier")
    solver: Literal["sgd", "lbfgs"] = Field(
        "sgd",
        description="kind linear by sgd: MAE's recipe, LARS on augmented images; or by lbfgs: "
        "logistic regression on features computed once, its strength cross-validated",
    )
    metric: Metric | None = Field(
        None,
        description="accuracy, mean_per_class or map11 (default: map11 where an image can have "
        "several labels, else accuracy)",
    )
    num_labels: Count | None = Field(None, description="labeled images per draw (default: all)")
    draws: Count = Field(1, description="random draws of the labels")
    pooling: Pooling | None = Field(
        None,
        description="feature: mean of patch tokens, or cls, the class token (default: cls for "
        "solver sgd if the encoder has one, else mean)",
    )
    neighbors: Count = Field(20, description="neighbors k (kind knn)")
    epochs: Positive = Field(90, description="passes over the images (solver sgd)")
    batch_size: Count = Field(
        16384, ge=2, description="images per optimizer step, at most all there are (solver sgd)"
    )
    micro_batch_size: Count = Field(256, description="images per forward pass")
    base_lr: Positive = Field(
        0.1,
        description="learning rate per 256 images; the rate is base_lr * images per step / 256 "
        "(solver sgd)",
    )
    warmup: Fraction = Field(
        round(10 / 90, 4), description="share of the steps with rising learning rate (solver sgd)"
    )
    crop_scale: Fraction = Field(
        0.08, description="smallest random crop, share of the image's area (solver sgd)"
    )
    hflip: bool = Field(True, description="mirror half of the images (solver sgd)")
    out: Folder | None = Field(None, description="folder to write results.json to")
    overwrite: bool = Field(False, description="replace what is in the output folder")


class FinetuneSettings(TrainingSettings):
    """Train a backbone end to end on a labeled task."""

    # The defaults are MAE's for ViT-B, taken for smaller encoders too; what differs for larger
    # ones, where it is not given, is in transfer/finetune.py (`by_size`).

    backbone: str = Field(
        description="customized folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: Data = Field(description=LABELED)
    num_labels: Count | None = Field(None, description="labeled images to train on (default: all)")
    draw: Index = Field(0, description="which random draw of the labels, as numbered by moce probe")
    metric: Metric | None = Field(
        None,
        description="accuracy, mean_per_class or map11 (default: map11 where an image can have "
        "several labels, else accuracy)",
    )
    epochs: Positive = Field(
        100, description="passes over the images, fractions allowed; 50 from ViT-L on"
    )
    batch_size: Count = Field(1024, description="images per optimizer step, over all micro-batches")
    micro_batch_size: Count | None = Field(
        256, description="images per forward pass; gradients add up to one batch"
    )
    base_lr: Positive = Field(
        5e-4,
        description="learning rate per 256 images; the rate is base_lr * batch_size / 256; "
        "1e-3 from ViT-L on",
    )
    lr_grid: tuple[Positive, ...] = Field(
        (),
        description="base_lr values to choose from: each is trained on a part of the training "
        "images and scored on the rest, the best then trained on all of them",
    )
    val_share: OpenFraction = Field(
        0.2, description="share of the training images that lr_grid is scored on"
    )
    beta2: OpenFraction = Field(0.999, description="AdamW second-moment decay")
    warmup: Fraction = Field(
        0.05, description="share of the steps with rising learning rate; 0.1 from ViT-L on"
    )
    min_lr: NonNegative = Field(1e-6, description="learning rate at the end of the cosine")
    layer_decay: Fraction = Field(
        0.65, description="learning rate of a block over the next one's; 0.75 from ViT-L on"
    )
    drop_path: Fraction = Field(
        0.1, description="stochastic depth rate of the last block; ViT-L 0.2, ViT-H 0.3"
    )
    rand_augment: str = Field(
        "rand-m9-mstd0.5-inc1",
        description="timm's RandAugment policy, done image by image on the CPU ('': off)",
    )
    random_erasing: Fraction = Field(
        0.25, description="chance that a rectangle of an image becomes noise"
    )
    mixup: NonNegative = Field(0.8, description="mixup alpha (0: off)")
    cutmix: NonNegative = Field(1.0, description="cutmix alpha (0: off)")
    smoothing: Fraction = Field(0.1, description="label smoothing (one label per image)")
    crop_scale: Fraction = Field(
        0.08, description="smallest random crop, share of the image's area"
    )


class EvaluateSettings(RunSettings):
    """Compare backbones, and MoCE runs customized for each task, on a suite of labeled tasks."""

    suite: Folder = Field(description="YAML file of tasks, e.g. recipes/suites/paper11.yaml")
    backbones: tuple[str, ...] = Field(
        min_length=1,
        description="what to compare, NAME=REFERENCE each; for a MoCE run also NAME=RUN@HOW, HOW one "
        "of auto, route, merge, generalist, probe (by labels), random (route), oracle (best route)",
    )
    protocols: tuple[Protocol, ...] = Field(
        ("linear",), description="linear and knn probes on frozen features, finetune"
    )
    tasks: tuple[str, ...] = Field((), description="tasks of the suite to run (default: all)")
    role: Role | None = Field(None, description="only the suite's tasks of this role")
    root: Folder = Field(Path(), description="folder that relative paths of the suite start from")
    draws: Count | None = Field(None, description="random draws of the labels (default: suite's)")
    finetune_draws: Count = Field(1, description="of these draws, how many are fine-tuned on")
    resume: bool = Field(False, description="go on where an interrupted evaluation stopped")
