"""Types and what verbs have in common: where to compute, what to write, how to train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def expand(path: Path) -> Path:
    """A path with ~ as the home folder, also where no shell has seen to it."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for unknown users


def _possible(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("no path has a zero byte in it")
    return expand(path)


Folder = Annotated[Path, AfterValidator(_possible)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
MOST = 1e9  # of numbers without a limit of their own: products of such are still finite floats
Positive = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Index = Annotated[int, Field(ge=0, le=2**62)]
Threads = Annotated[int, Field(ge=1, le=1024)]


def _one_or_several(value: Any) -> Any:
    """A single number as a list of one."""
    return (value,) if isinstance(value, int | float) else value


def _text(value: Any) -> Any:
    """A path as it is written."""
    return str(value) if isinstance(value, Path) else value


def _joined(value: Any) -> Any:
    """A path, or a list of sources, as one DATA argument."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, list | tuple):
        return value
    parts = [str(part) for part in value]
    comma = next((part for part in parts if "," in part and "{" not in part), None)
    if comma is not None and len(parts) > 1:
        raise ValueError(f"'{comma}' has a comma in it: name it in a list of lines, @FILE")
    return ",".join(parts)


Channels = Annotated[tuple[Fraction, ...], BeforeValidator(_one_or_several), Field(min_length=1)]
Deviations = Annotated[tuple[Positive, ...], BeforeValidator(_one_or_several), Field(min_length=1)]
Data = Annotated[str, BeforeValidator(_joined)]
Reference = Annotated[str, BeforeValidator(_text)]  # a path or a name
IMAGES = (
    "images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a saved Hugging "
    "Face data set, hf:NAME, torchvision:NAME, a packed file or demo:pretrain; several with commas "
    "between, or one per line of @FILE"
)
LABELED = "labeled images: class folders (train/ and test/ if split), or another source with labels"

Strategy = Literal["auto", "route", "merge", "generalist", "probe"]
Format = Literal["timm", "transformers", "torch", "onnx"]
Method = Literal["moce", "mae", "token_moe", "sdr", "subset"]
GateScale = Literal["straight_through", "prob"]
GateInit = Literal["centroids", "random"]
BalanceScope = Literal["dataset", "batch"]
Processes = Literal["auto", "ddp", "fsdp"]
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


class DataSettings(RuntimeSettings):
    """A verb that reads images."""

    max_skipped: Fraction = Field(
        0.5, description="largest share of the images that may be unreadable; beyond it, stop"
    )


class RunSettings(DataSettings):
    """A verb that leaves a run folder."""

    out: Folder = Field(description="folder to write the run to")
    overwrite: bool = Field(False, description="replace what is in the output folder")


class ResidentSettings(Settings):
    """A verb that goes through its data again and again."""

    cache_on_gpu: bool = Field(
        True,
        description="keep the data on the GPU (pixels, or the features of a clustering) if they take "
        "at most a quarter of its free memory",
    )


class TrainingSettings(RunSettings, ResidentSettings):
    """A verb that optimizes a network step by step."""

    resume: bool = Field(False, description="go on from the last checkpoint of the output folder")
    epochs: Positive = Field(400, description="passes over the images (fractions allowed)")
    steps: Count | None = Field(
        None, description="optimizer steps, whatever the number of images (default: by epochs)"
    )
    batch_size: Count = Field(
        256, description="images per optimizer step, over all processes and micro-batches"
    )
    micro_batch_size: Count | None = Field(
        None,
        description="images per forward pass of each process; gradients add up to one batch "
        "(default: all)",
    )
    base_lr: Positive = Field(
        1.5e-4, description="learning rate per 256 images; the rate is base_lr * batch_size / 256"
    )
    weight_decay: NonNegative = Field(
        0.05, description="AdamW weight decay (none on biases, norms)"
    )
    beta2: OpenFraction = Field(0.95, description="AdamW second-moment decay")
    clip_grad: Positive | None = Field(
        None, description="largest norm of a step's gradient; a longer one is scaled down to it"
    )
    warmup: Fraction = Field(0.05, description="share of the steps with rising learning rate")
    min_lr: NonNegative = Field(0.0, description="learning rate at the end of the cosine")
    crop_scale: Fraction = Field(0.2, description="smallest random crop, share of the image's area")
    hflip: bool = Field(True, description="mirror half of the images")
    grad_checkpointing: bool = Field(
        False,
        description="less memory for one more forward pass: what is within a block is computed again "
        "for the backward pass",
    )
    strategy: Processes = Field(
        "auto",
        description="with several processes, what each holds: ddp, the whole network, or fsdp, a share "
        "of it; auto: ddp (one process: no difference)",
    )
    log_every: Count = Field(
        20, description="steps between lines of metrics.jsonl and timings.jsonl"
    )
    save_every: Count = Field(500, description="steps between checkpoints")
    tensorboard: bool = Field(False, description="also write TensorBoard events")
