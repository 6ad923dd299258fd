"""The settings of every verb: names, types, defaults, units. Flags, recipes and functions read them here.

One class per verb. Unknown names and wrong types are refused, all of them in one message, with
the nearest valid name (`parse`). Nothing heavy is imported, so that `moce --help` is quick.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moce.errors import MoceError


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

Strategy = Literal["auto", "route", "merge", "generalist"]
GateScale = Literal["straight_through", "prob"]
GateInit = Literal["centroids", "random"]
BalanceScope = Literal["dataset", "batch"]
Pooling = Literal["mean", "cls"]
CentroidUpdate = Literal["hard", "soft"]


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
    pooling: Pooling = Field(
        "mean", description="image feature: mean of patch tokens, or class token"
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
    """Train cluster-conditional experts from an MAE (stage 2), or continue the MAE (MAE+)."""

    data: str = Field(description="images: a folder, a parquet file or demo:pretrain")
    mae: Folder = Field(description="run folder of moce pretrain")
    clusters: Folder | None = Field(
        None, description="run folder of moce cluster (not for method mae)"
    )
    method: Literal["moce", "mae"] = Field(
        "moce", description="moce: experts; mae: the same steps without experts (MAE+)"
    )
    num_experts: Count = Field(8, description="experts E per MoE block")
    moe_blocks: tuple[Index, ...] | None = Field(
        None, description="encoder blocks with experts, e.g. 9,11 (default: the last two odd ones)"
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


class CustomizeSettings(RuntimeSettings):
    """Pick the expert for a task and export a dense timm backbone (stage 3)."""

    run: Folder = Field(description="run folder of moce train")
    images: str = Field(description="the task's images (labels are not used)")
    out: Folder = Field(description="folder to write the backbone to")
    overwrite: bool = Field(False, description="replace what is in the output folder")
    strategy: Strategy = Field(
        "auto",
        description="route: winner's experts; merge: averaged by the task's votes; "
        "generalist: by the training data's; auto: route when the winner is clear, else merge",
    )
    threshold: Fraction = Field(0.5, description="vote share from which auto takes the winner")
    assign: Literal["balanced", "nearest"] = Field(
        "balanced", description="cluster of an image: as in training, or the nearest centroid"
    )
    batch_size: Count = Field(256, description="images per forward pass")


class ProbeSettings(RuntimeSettings):
    """Score frozen features on a labelled task with a linear or nearest-neighbour classifier."""

    backbone: str = Field(
        description="customised folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: str = Field(description="labelled images: class folders (train/ and test/ if split)")
    kind: Literal["linear", "knn"] = Field("linear", description="classifier")
    num_labels: Count | None = Field(None, description="labelled images per draw (default: all)")
    draws: Count = Field(1, description="random draws of the labels")
    pooling: Pooling = Field("mean", description="feature: mean of patch tokens, or class token")
    neighbours: Count = Field(20, description="neighbours k (kind knn)")
    batch_size: Count = Field(256, description="images per forward pass")
    out: Folder | None = Field(None, description="folder to write results.json to")
    overwrite: bool = Field(False, description="replace what is in the output folder")


class FinetuneSettings(TrainingSettings):
    """Train a backbone end to end on a labelled task."""

    backbone: str = Field(
        description="customised folder, MAE run folder, timm name (nothing fine-tuned)"
    )
    data: str = Field(description="labelled images: class folders (train/ and test/ if split)")
    num_labels: Count | None = Field(None, description="labelled images to train on (default: all)")
    epochs: Positive = Field(100, description="passes over the images (fractions allowed)")
    base_lr: Positive = Field(
        5e-4, description="learning rate per 256 images; the rate is base_lr * batch_size / 256"
    )
    beta2: OpenFraction = Field(0.999, description="AdamW second-moment decay")
    min_lr: NonNegative = Field(1e-6, description="learning rate at the end of the cosine")
    layer_decay: Fraction = Field(0.65, description="learning rate of a block over the next one's")
    drop_path: Fraction = Field(0.1, description="stochastic depth rate of the last block")
    mixup: NonNegative = Field(0.8, description="mixup alpha (0: off)")
    cutmix: NonNegative = Field(1.0, description="cutmix alpha (0: off)")
    smoothing: Fraction = Field(0.1, description="label smoothing")
    crop_scale: Fraction = Field(
        0.08, description="smallest random crop, share of the image's area"
    )


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


S = TypeVar("S", bound=Settings)


def parse(kind: type[S], values: dict[str, Any]) -> S:
    """Validate `values` as settings of `kind`. Raises MoceError naming every mistake at once."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        known = [field.alias or name for name, field in kind.model_fields.items()]
        mistakes = [_describe(mistake, known) for mistake in error.errors()]
        if any(text.endswith("'") for text in mistakes):  # an unknown name like no valid one
            mistakes.append(f"valid settings: {', '.join(known)}")
        raise MoceError("; ".join(mistakes)) from None


def _describe(mistake: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown setting '{name}'" + (f" (did you mean '{near[0]}'?)" if near else "")
    if mistake["type"] == "missing":
        return f"setting '{name}' is missing"
    return f"setting '{name}': {mistake['msg'].lower()} (got {mistake['input']!r})"


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe. Raises MoceError if it is missing or no mapping of settings."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MoceError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise MoceError(f"recipe {path} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise MoceError(f"recipe {path} must hold 'setting: value' lines")
    return content
