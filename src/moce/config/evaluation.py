"""Settings of embed, probe, finetune and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moce.config.base import (
    BACKBONE,
    EXPORTED,
    IMAGES,
    LABELED,
    WORKERS,
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
    Reference,
    Role,
    RunSettings,
    Steps,
    TrainingSettings,
    Workers,
)
from moce.config.dense import CLASSIFY, DenseTaskSettings
from moce.config.facts import GIVEN, setting

BY_SGD: dict[str, tuple[str, ...]] = {"kind": ("linear",), "solver": ("sgd",)}
METRIC: Any = setting(
    None,
    "accuracy, mean_per_class or map11 (default: map11 where an image can have several labels, "
    "else accuracy)",
    set_by_evaluate=True,
)


class EmbedSettings(DataSettings):
    """Write one feature per image to a parquet file: columns id, label, split, embedding."""

    backbone: Reference = setting(description=BACKBONE, input="weights")
    data: Data = setting(description=IMAGES, input="images")
    out: Folder = setting(description="file to write, FILE.parquet")
    pooling: Pooling = setting("mean", "feature: mean of patch tokens, or cls, the class token")
    batch_size: Count = setting(256, "images per forward pass")
    overwrite: bool = setting(False, "replace the output file")


class ProbeSettings(DataSettings):
    """Score frozen features on a labeled task with a linear or nearest-neighbor classifier."""

    proofs = frozenset({"results.json"})  # of moce 0.1.0
    files = frozenset({"rows.jsonl"})

    # The defaults of solver sgd are those published for MAE's linear probe on ImageNet-1K.

    backbone: Reference = setting(description=BACKBONE, input="weights")
    data: Data = setting(description=LABELED, input="images")
    kind: Literal["linear", "knn"] = setting("linear", "classifier", set_by_evaluate=True)
    solver: Literal["sgd", "lbfgs"] = setting(
        "sgd",
        "kind linear by sgd: MAE's recipe, LARS on augmented images; or by lbfgs: logistic "
        "regression on features computed once, its strength cross-validated",
        used_with={"kind": ("linear",)},
    )
    metric: Metric | None = METRIC
    num_labels: Count | None = setting(
        None, "labeled images per draw (default: all)", set_by_evaluate=True
    )
    draws: Count = setting(1, "random draws of the labels")
    pooling: Pooling | None = setting(
        None,
        "feature: mean of patch tokens, or cls, the class token (default: cls for solver sgd if the "
        "encoder has one, else mean)",
    )
    neighbors: Count = setting(
        20, "neighbors k (kind knn)", used_with={"kind": ("knn",)}, was="neighbours"
    )
    epochs: Positive = setting(
        90,
        "passes over the images (solver sgd)",
        used_with=BY_SGD,
    )
    batch_size: Annotated[Count, Field(ge=2)] = setting(
        16384,
        "images per optimizer step, at most all there are (solver sgd)",
        used_with=BY_SGD,
    )
    micro_batch_size: Count = setting(256, "images per forward pass")
    base_lr: Positive = setting(
        0.1,
        "learning rate per 256 images; the rate is base_lr * images per step / 256 (solver sgd)",
        used_with=BY_SGD,
    )
    warmup: Fraction = setting(
        round(10 / 90, 4),
        "share of the steps with a rising learning rate (solver sgd)",
        used_with=BY_SGD,
    )
    crop_scale: Fraction = setting(
        0.08,
        "smallest random crop, as a share of the image's area (solver sgd)",
        used_with=BY_SGD,
    )
    hflip: bool = setting(
        True,
        "flip half of the images horizontally (solver sgd)",
        used_with=BY_SGD,
    )
    workers: Workers | None = setting(
        None,
        f"{WORKERS.description} (solver sgd)",
        used_with=BY_SGD,
    )
    out: Folder | None = setting(None, "folder to write results.json to")
    overwrite: bool = setting(
        False, "replace the contents of the output folder", used_with={"out": (GIVEN,)}
    )


class FinetuneSettings(TrainingSettings, DenseTaskSettings):
    """Train a backbone end to end on a labeled task: to classify, to detect or to segment."""

    # The defaults are MAE's for ViT-B, and used for smaller encoders too. `by_size` in
    # evaluation/finetune.py changes some of them for larger encoders, unless they are given;
    # `by_task` in dense/recipe.py those of detection and segmentation.

    proofs = frozenset({"results.json"})  # of moce 0.1.0
    files = EXPORTED | {"rows.jsonl", "network.py", "examples.png"}
    folders = frozenset({"adapter"})

    backbone: Reference = setting(description=BACKBONE, input="weights")
    data: Data = setting(description=LABELED, input="images")
    num_labels: Count | None = setting(
        None, "labeled images to train on (default: all)", set_by_evaluate=True
    )
    draw: Index = setting(
        0, "which random draw of the labels, as numbered by moce probe", set_by_evaluate=True
    )
    metric: Metric | None = setting(
        None,
        "accuracy, mean_per_class or map11 (default: map11 where an image can have several labels, "
        "else accuracy)",
        set_by_evaluate=True,
        used_with=CLASSIFY,
    )
    epochs: Positive = setting(100, "passes over the images, fractions allowed; 50 from ViT-L on")
    batch_size: Count = setting(1024, "images per optimizer step, over all micro-batches")
    base_lr: Positive = setting(
        5e-4,
        "learning rate per 256 images; the rate is base_lr * batch_size / 256; 1e-3 from ViT-L on",
    )
    lr_grid: tuple[Positive, ...] = setting(
        (),
        "base_lr values to choose from: each is trained on some of the training images and scored "
        "on the rest, then the best is trained on all of them",
        replaces="base_lr",
        used_with=CLASSIFY,
    )
    val_share: OpenFraction = setting(
        0.2,
        "share of the training images that lr_grid or keep_best scores",
        used_with=CLASSIFY,
    )
    keep_best: bool = setting(
        False,
        "hold out val_share of the training images, score them at every line of metrics.jsonl (by "
        "default once an epoch) and keep the best weights",
        used_with=CLASSIFY,
    )
    patience: Count | None = setting(
        None,
        "stop after so many scores without a better one",
        used_with={"keep_best": (GIVEN,)},
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "decay of a moving average of the weights, which then is validated, scored and saved "
        "(0: none), e.g. 0.998",
        used_with=CLASSIFY,
    )
    freeze: Literal["backbone"] | Index = setting(
        0,
        "train only what follows the first N blocks; backbone: only the new head",
    )
    lora: Count | None = setting(
        None,
        "train adapters of this rank (LoRA) beside the linear layers of the frozen blocks, and the "
        "head; base_lr then is 5e-3 and layer_decay 1 unless given",
        used_with=CLASSIFY,
    )
    lora_alpha: Count | None = setting(
        None,
        "the adapters' product is scaled by lora_alpha / lora (default: by 1)",
        used_with={"lora": (GIVEN,)},
    )
    lora_targets: Annotated[tuple[Literal["attn", "mlp"], ...], Field(min_length=1)] = setting(
        ("attn", "mlp"),
        "which linear layers of a block have adapters: attn, mlp or both",
        before=["attn", "mlp"],
        used_with={"lora": (GIVEN,)},
    )
    class_weights: Literal["none", "balanced"] = setting(
        "none",
        "weight of a class in the loss (one label per image); balanced: inverse to its images",
        before="none",
        used_with=CLASSIFY,
    )
    sampling: Literal["shuffled", "balanced"] = setting(
        "shuffled",
        "shuffled: every training image once an epoch; balanced: as many images of each class as of any "
        "other (one label per image)",
        before="shuffled",
        used_with=CLASSIFY,
    )
    beta2: OpenFraction = setting(0.999, "AdamW second-moment decay")
    warmup: Fraction = setting(
        0.05, "share of the steps with a rising learning rate; 0.1 from ViT-L on"
    )
    min_lr: NonNegative = setting(1e-6, "learning rate at the end of the cosine")
    layer_decay: Fraction = setting(
        0.65, "learning rate of a block over that of the next; 0.75 from ViT-L on"
    )
    drop_path: Fraction = setting(
        0.1, "stochastic depth rate of the last block; ViT-L 0.2, ViT-H 0.3"
    )
    rand_augment: str = setting(
        "rand-m9-mstd0.5-inc1",
        "timm's RandAugment policy, applied image by image on the CPU ('': off)",
        used_with=CLASSIFY,
    )
    random_erasing: Fraction = setting(
        0.25, "probability that a rectangle of an image is replaced by noise", used_with=CLASSIFY
    )
    mixup: NonNegative = setting(0.8, "mixup alpha (0: off)", used_with=CLASSIFY)
    cutmix: NonNegative = setting(1.0, "cutmix alpha (0: off)", used_with=CLASSIFY)
    smoothing: Fraction = setting(0.1, "label smoothing (one label per image)", used_with=CLASSIFY)
    crop_scale: Fraction = setting(
        0.08, "smallest random crop, as a share of the image's area", used_with=CLASSIFY
    )


class EvaluateSettings(RunSettings):
    """Compare backbones, and MoCE runs customized for each task, on a suite of labeled tasks."""

    # Each row of results stands for itself, so a resumed evaluation may ask for others.

    files = frozenset({"rows.jsonl", "results.md", "evaluation.json"})

    suite: Folder = setting(
        description="YAML file of tasks, e.g. recipes/suites/paper11.yaml", input="file"
    )
    backbones: Annotated[tuple[str, ...], Field(min_length=1)] = setting(
        description="what to compare, NAME=REFERENCE each; for a MoCE run also NAME=RUN@SELECTION, "
        "one of auto, route, merge, generalist, probe (by labels), random (route), best_route and "
        "best_strategy (on the other half of the test images); NAME=REFERENCE@adapt adapts a masked "
        "autoencoder to each task, NAME=RUN@auto+adapt the experts that a strategy chooses",
        may_change=True,
    )
    protocols: tuple[Protocol, ...] = setting(
        ("linear",), "linear and knn probes on frozen features, finetune", may_change=True
    )
    tasks: tuple[str, ...] = setting(
        (), "tasks of the suite to run (default: all)", may_change=True
    )
    role: Role | None = setting(None, "only the suite's tasks of this role", may_change=True)
    root: Folder = setting(
        Path(), "folder that relative paths of the suite start from", may_change=True
    )
    draws: Count | None = setting(None, "random draws of the labels (default: the suite's)")
    finetune_draws: Count = setting(1, "how many of these draws to fine-tune on")
    adapt_steps: Steps = setting(
        "auto",
        "optimizer steps of adaptation (@adapt) on the training images of a task; auto: as moce "
        "customize",
        before="auto",
    )
    adapt_data: Data | None = setting(
        None,
        "pool to adapt on as well: images of the task's clusters are drawn from it",
        input="images",
    )
    adapt_clusters: Folder | None = setting(
        None,
        "run folder of moce cluster, to find related images of the pool (default: a MoCE run's own)",
        input="weights",
        used_with={"adapt_data": (GIVEN,)},
    )
    adapt_pool_share: OpenFraction = setting(
        0.5,
        "share of the pool's images in a batch of adaptation",
        before=0.5,
        used_with={"adapt_data": (GIVEN,)},
    )
    adapt_batch_size: Count = setting(128, "images per optimizer step of adaptation", before=128)
    adapt_lr: Positive | None = setting(
        None,
        "base learning rate of adaptation per 256 images (default: half of the run's; 7.5e-5 for "
        "other weights)",
    )
    resume: bool = setting(False, "resume an interrupted evaluation", may_change=True)
