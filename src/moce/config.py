"""The settings of every verb: names, types, defaults, units. Flags, recipes and functions read them here.

One class per verb; `moce.parsing` checks values against them. Nothing heavy is imported, so that
`moce --help` is quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def expand(path: Path) -> Path:
    """A path with ~ as the home folder, also where no shell has seen to it."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for unknown users


Folder = Annotated[Path, AfterValidator(expand)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Index = Annotated[int, Field(ge=0, le=2**62)]
Threads = Annotated[int, Field(ge=1, le=1024)]

Channels = tuple[Fraction, Fraction, Fraction]
Deviations = tuple[Positive, Positive, Positive]

Strategy = Literal["auto", "route", "merge", "generalist", "probe"]
Method = Literal["moce", "mae", "token_moe", "sdr", "subset"]
GateScale = Literal["straight_through", "prob"]
GateInit = Literal["centroids", "random"]
BalanceScope = Literal["dataset", "batch"]
Pooling = Literal["mean", "cls"]
ClusterPooling = Literal["mean", "cls", "pixels"]
CentroidUpdate = Literal["hard", "soft"]
Metric = Literal["accuracy", "mean_per_class", "map11"]
Protocol = Literal["linear", "knn", "finetune"]
Role = Literal["development", "held_out"]


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown names, finite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    json_output: bool = Field(
        False, alias="json", exclude=True, description="print the result as JSON"
    )


class RuntimeSettings(Settings):
    """Where a verb runs."""

    seed: Index = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="arithmetic of the networks; auto picks bf16 where it is faster"
    )
    threads: Threads | None = Field(
        None, description="CPU threads (default: OMP_NUM_THREADS, or all cores)"
    )


class RunSettings(RuntimeSettings):
    """A verb that leaves a run folder."""

    out: Folder = Field(description="folder to write the run to")
    overwrite: bool = Field(False, description="replace what is in the output folder")


class TrainingSettings(RunSettings):
    """A verb that optimises a network step by step."""

    resume: bool = Field(False, description="go on from the last checkpoint of the output folder")
    epochs: Positive = Field(400, description="passes over the images (fractions allowed)")
    steps: Count | None = Field(
        None, description="optimiser steps, whatever the number of images (default: by epochs)"
    )
    batch_size: Count = Field(
        256, description="images per optimiser step, over all devices and micro-batches"
    )
    micro_batch_size: Count | None = Field(
        None, description="images per forward pass; gradients add up to one batch (default: all)"
    )
    base_lr: Positive = Field(
        1.5e-4, description="learning rate per 256 images; the rate is base_lr * batch_size / 256"
    )
    weight_decay: NonNegative = Field(
        0.05, description="AdamW weight decay (none on biases, norms)"
    )
    beta2: OpenFraction = Field(0.95, description="AdamW second-moment decay")
    warmup: Fraction = Field(0.05, description="share of the steps with rising learning rate")
    min_lr: NonNegative = Field(0.0, description="learning rate at the end of the cosine")
    crop_scale: Fraction = Field(0.2, description="smallest random crop, share of the image's area")
    hflip: bool = Field(True, description="mirror half of the images")
    log_every: Count = Field(20, description="steps between lines of metrics.jsonl")
    save_every: Count = Field(500, description="steps between checkpoints")
    tensorboard: bool = Field(False, description="also write TensorBoard events")


class PretrainSettings(TrainingSettings):
    """Pre-train a masked autoencoder on unlabelled images (stage 0)."""

    data: str = Field(description="images: a folder, a parquet file or demo:pretrain")
    model: str = Field("vit_base_patch16_224", description="encoder: any plain timm ViT")
    model_args: dict[str, Any] = Field(
        {}, description='timm model arguments, e.g. {"embed_dim": 128, "depth": 6}'
    )
    img_size: Count | None = Field(None, description="image side in pixels (default: the model's)")
    init: str | None = Field(
        None, description="start from a moce MAE run, or the timm model's own weights: 'pretrained'"
    )
    mean: Channels = Field(
        (0.485, 0.456, 0.406), description="mean of the channels, 0..1, that pixels are centred on"
    )
    std: Deviations = Field(
        (0.229, 0.224, 0.225), description="deviation of the channels that pixels are scaled by"
    )
    mask_ratio: OpenFraction = Field(0.75, description="share of patches hidden")
    norm_pix: bool = Field(True, description="predict pixels normalised per patch")
    decoder_dim: Count = Field(512, description="decoder width")
    decoder_depth: Count = Field(8, description="decoder blocks")
    decoder_heads: Count = Field(16, description="decoder attention heads")


class ClusterSettings(RunSettings):
    """Group the images into balanced clusters by an MAE's features (stage 1)."""

    data: str = Field(description="images: a folder, a parquet file or demo:pretrain")
    mae: Folder = Field(description="run folder of moce pretrain")
    num_clusters: Count = Field(256, description="number of clusters K")
    pooling: ClusterPooling = Field(
        "mean",
        description="image feature: mean of patch tokens, cls, the class token, or pixels, the mean "
        "colours of a 16 x 16 grid",
    )
    epsilon: Positive = Field(0.01, description="entropy weight of the balanced assignment")
    update: CentroidUpdate = Field(
        "hard", description="centroids: mean of assigned images (hard) or Q-weighted mean (soft)"
    )
    marginal_tolerance: Positive = Field(
        0.01, description="largest relative error of a cluster's mass in Sinkhorn-Knopp"
    )
    max_rounds: Count = Field(50, description="most rounds of assignment and centroid update")
    chunk_size: Count = Field(
        65536, description="images whose assignment is held in memory at once"
    )
    batch_size: Count = Field(256, description="images per forward pass")


class TrainSettings(TrainingSettings):
    """Train cluster-conditional experts from an MAE (stage 2), or a baseline for as long."""

    data: str = Field(description="images: a folder, a parquet file or demo:pretrain")
    mae: Folder = Field(description="run folder of moce pretrain")
    clusters: Folder | None = Field(
        None, description="run folder of moce cluster (not for methods mae and token_moe)"
    )
    method: Method = Field(
        "moce",
        description="moce: experts; baselines for the same steps: mae (MAE+, no experts), token_moe "
        "(the gate reads tokens), sdr (experts of clusters fixed beforehand), subset (mae on the "
        "images of one task's clusters only)",
    )
    task: str | None = Field(None, description="the task's images (for method subset)")
    task_share: Fraction = Field(
        0.9, description="share of the task's images whose clusters method subset trains on"
    )
    num_experts: Count = Field(8, description="experts E per MoE block")
    moe_blocks: tuple[Index, ...] | None = Field(
        None, description="encoder blocks with experts, e.g. 9,11 (default: the last two odd ones)"
    )
    expert_scope: Literal["ffn", "block"] = Field(
        "ffn", description="what an expert is: the block's FFN (the paper's), or the whole block"
    )
    gate_scale: GateScale = Field(
        "straight_through",
        description="scale of an expert's output: straight_through (value 1) or prob (the paper's)",
    )
    gate_init: GateInit = Field(
        "centroids", description="gates start from groups of centroids, or at random"
    )
    gate_confidence: OpenFraction = Field(
        0.8, description="mean largest gate probability at the start (gate_init centroids)"
    )
    gate_init_std: Positive = Field(
        0.02, description="standard deviation of gate weights (gate_init random)"
    )
    gate_lr_scale: Positive = Field(1.0, description="gates' learning rate over the others'")
    gate_noise: bool = Field(True, description="add noise N(0, 1/E^2) to gate logits in training")
    shared_gate: bool = Field(False, description="one gate, so one route, for all MoE blocks")
    balance_weight: NonNegative = Field(0.01, description="weight of the balance loss")
    imbalance_weight: NonNegative = Field(0.01, description="weight of the imbalance loss")
    balance_scope: BalanceScope = Field(
        "dataset", description="experts' work counted over the data set's clusters or the batch"
    )


class HeadroomSettings(TrainingSettings):
    """Estimate, before training experts, whether these images and this MAE leave them anything to gain."""

    data: str = Field(description="images: a folder, a parquet file or demo:pretrain")
    mae: Folder = Field(description="run folder of moce pretrain")
    clusters: Folder = Field(description="run folder of moce cluster")
    steps: Count | None = Field(
        800, description="optimiser steps on all images; a group alone takes its share of them"
    )
    num_groups: Count = Field(4, description="groups of clusters, each trained on alone")


class CustomizeSettings(RuntimeSettings):
    """Pick the expert for a task and export a dense timm backbone (stage 3)."""

    run: Folder = Field(description="run folder of moce train")
    images: str = Field(description="the task's images (labels are used by strategy probe only)")
    out: Folder = Field(description="folder to write the backbone to")
    overwrite: bool = Field(False, description="replace what is in the output folder")
    strategy: Strategy = Field(
        "auto",
        description="route: winner's experts; merge: averaged by the task's votes; "
        "generalist: by the training data's; auto: route when the winner is clear, else merge; "
        "probe: whichever classifies the images' labels best on frozen features",
    )
    threshold: Fraction = Field(0.5, description="vote share from which auto takes the winner")
    assign: Literal["balanced", "nearest"] = Field(
        "balanced", description="cluster of an image: as in training, or the nearest centroid"
    )
    batch_size: Count = Field(256, description="images per forward pass")


class ProbeSettings(RuntimeSettings):
    """Score frozen features on a labelled task with a linear or nearest-neighbour classifier."""

    # The defaults of solver sgd are those published for MAE's linear probe on ImageNet-1K.

    backbone: str = Field(
        description="customised folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: str = Field(description="labelled images: class folders (train/ and test/ if split)")
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
    num_labels: Count | None = Field(None, description="labelled images per draw (default: all)")
    draws: Count = Field(1, description="random draws of the labels")
    pooling: Pooling | None = Field(
        None,
        description="feature: mean of patch tokens, or cls, the class token (default: cls for "
        "solver sgd if the encoder has one, else mean)",
    )
    neighbours: Count = Field(20, description="neighbours k (kind knn)")
    epochs: Positive = Field(90, description="passes over the images (solver sgd)")
    batch_size: Count = Field(
        16384, ge=2, description="images per optimiser step, at most all there are (solver sgd)"
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
    """Train a backbone end to end on a labelled task."""

    # The defaults are MAE's for ViT-B, taken for smaller encoders too; what differs for larger
    # ones, where it is not given, is in transfer/finetune.py (`by_size`).

    backbone: str = Field(
        description="customised folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: str = Field(description="labelled images: class folders (train/ and test/ if split)")
    num_labels: Count | None = Field(None, description="labelled images to train on (default: all)")
    draw: Index = Field(0, description="which random draw of the labels, as numbered by moce probe")
    metric: Metric | None = Field(
        None,
        description="accuracy, mean_per_class or map11 (default: map11 where an image can have "
        "several labels, else accuracy)",
    )
    epochs: Positive = Field(
        100, description="passes over the images, fractions allowed; 50 from ViT-L on"
    )
    batch_size: Count = Field(1024, description="images per optimiser step, over all micro-batches")
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
    """Compare backbones, and MoCE runs customised for each task, on a suite of labelled tasks."""

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


class ReportSettings(Settings):
    """Draw run folders as one self-contained HTML page."""

    runs: tuple[Folder, ...] = Field(description="run folders, or a folder that holds some")
    out: Folder = Field(Path("report.html"), description="file to write")
    max_images: Count = Field(12, description="pictures per row of a montage")


class DemoSettings(RuntimeSettings):
    """Run every stage on the embedded images and compare MAE, MAE+ and MoCE on six tasks."""

    out: Folder = Field(Path("runs/demo"), description="folder to write the runs to")
    overwrite: bool = Field(False, description="replace what is in the output folder")
    reuse: bool = Field(
        False,
        description="show what is there if the same settings and version made it, else run anew",
    )
    tasks: tuple[str, ...] = Field((), description="tasks to run (default: all embedded ones)")
    pretrain_epochs: Positive = Field(18, description="epochs of the MAE")
    train_epochs: Positive = Field(8, description="epochs of MoCE and of MAE+")
    num_clusters: Count = Field(48, description="clusters K")
    num_experts: Count = Field(4, description="experts E per MoE block")
    num_labels: Count = Field(150, description="labelled images per draw")
    draws: Count = Field(3, description="draws of labels per probe")
    finetune_epochs: Positive = Field(16, description="epochs of each fine-tune")


class DoctorSettings(Settings):
    """Report versions, devices, precision, threads, disk space and what to mend."""

    out: Folder = Field(Path(), description="folder whose free disk space is looked at")
