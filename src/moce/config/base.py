"""Types and settings that commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from moce.config.facts import setting


@dataclass(frozen=True)
class Accepts:
    """What a caller in Python may pass, where it is more than the type of the setting."""

    hint: str


def expand(path: Path) -> Path:
    """A path with ~ replaced by the home folder, for callers that are no shell."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for unknown users


def _check_path(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path must not contain a zero byte")
    return expand(path)


def _number_to_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


def _path_to_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _join_sources(value: Any) -> Any:
    """A path, or a list of sources, as one DATA argument."""
    if not isinstance(value, list | tuple):
        return _path_to_text(value)
    parts = [str(part) for part in value]
    comma = next((part for part in parts if "," in part and "{" not in part), None)
    if comma is not None and len(parts) > 1:
        raise ValueError(f"'{comma}' contains a comma: list the sources in a file, @FILE")
    return ",".join(parts)


Folder = Annotated[Path, AfterValidator(_check_path)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
MOST = 1e9  # of numbers without a limit of their own: products of such are still finite floats
Positive = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Index = Annotated[int, Field(ge=0, le=2**62)]
Steps = Literal["auto"] | Count
Threads = Annotated[int, Field(ge=1, le=1024)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Numbers = Accepts("float | Sequence[float]")
Channels = Annotated[
    tuple[Fraction, ...], Numbers, BeforeValidator(_number_to_tuple), Field(min_length=1)
]
Deviations = Annotated[
    tuple[Positive, ...], Numbers, BeforeValidator(_number_to_tuple), Field(min_length=1)
]
Data = Annotated[str, Accepts("Data"), BeforeValidator(_join_sources)]
Reference = Annotated[str, Accepts("str | Path"), BeforeValidator(_path_to_text)]
IMAGES = (
    "images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a saved Hugging "
    "Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or demo:pretrain; separate several "
    "by commas, or list them in @FILE, one per line"
)
LABELED = "labeled images: class folders (train/ and test/ if split), or another source with labels"
BACKBONE = (
    "backbone: a customized folder, a run of moce pretrain or finetune, weights of another library (a "
    "file or a folder) or a timm name"
)

EXPORTED = frozenset(  # what a folder for another library may hold
    {"config.json", "README.md", "architecture.json", "model.onnx"}
    | {"preprocessing.json", "preprocessor_config.json"}
)

Strategy = Literal["auto", "route", "merge", "generalist", "probe"]
Format = Literal["timm", "transformers", "torch", "onnx"]
Method = Literal["moce", "mae", "token_moe", "sdr", "subset"]
GateScale = Literal["straight_through", "prob"]
GateInit = Literal["centroids", "random"]
BalanceScope = Literal["dataset", "batch"]
Processes = Literal["auto", "ddp", "fsdp"]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Pooling = Literal["mean", "cls"]
ClusterPooling = Literal["mean", "cls", "pixels"]
CentroidUpdate = Literal["hard", "soft"]
Metric = Literal["accuracy", "mean_per_class", "map11"]
Protocol = Literal["linear", "knn", "finetune"]
Role = Literal["development", "held_out"]


WORKERS: Any = setting(
    None,
    "processes that read and crop images ahead of their use (default: one per core, divided among "
    "the training processes of a machine; 0: none beside the training process)",
    may_change=True,
)


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown names, finite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    # What a command writes to its output folder, beside the files of every run (runs/folder.py), so
    # that --overwrite deletes nothing else. proofs: names that nobody but moce writes; folders: with
    # whatever is in them.
    proofs: ClassVar[frozenset[str]] = frozenset()
    files: ClassVar[frozenset[str]] = frozenset()
    folders: ClassVar[frozenset[str]] = frozenset()


class RuntimeSettings(Settings):
    """Where and how a command computes."""

    seed: Index = setting(0, "seed of all random numbers")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to compute on")
    precision: Literal["auto", "float32", "bf16"] = setting(
        "auto", "dtype of the networks' arithmetic; auto picks bf16 where it is faster"
    )
    threads: Threads | None = setting(
        None, "CPU threads (default: OMP_NUM_THREADS, or all cores)", may_change=True
    )


class DataSettings(RuntimeSettings):
    """A command that reads images."""

    max_skipped: Fraction = setting(
        0.5, "stop if a larger share of the images cannot be read", may_change=True
    )


class RunSettings(DataSettings):
    """A command that writes a run folder."""

    out: Folder = setting(description="folder to write the run to", may_change=True)
    overwrite: bool = setting(False, "replace the contents of the output folder", may_change=True)


class CacheSettings(Settings):
    """A command that reads its data many times."""

    cache_on_gpu: bool = setting(
        True,
        "keep the data (pixels, or features when clustering) on the GPU if they take at most a "
        "quarter of its free memory",
        may_change=True,
        was="resident",
    )


class TrainingSettings(RunSettings, CacheSettings):
    """A command that trains a network step by step."""

    resume: bool = setting(
        False, "resume from the last checkpoint in the output folder", may_change=True
    )
    epochs: Positive = setting(400, "passes over the images (fractions allowed)")
    steps: Count | None = setting(None, "optimizer steps (default: from epochs)", replaces="epochs")
    batch_size: Count = setting(
        256, "images per optimizer step, over all processes and micro-batches"
    )
    micro_batch_size: Count | None = setting(
        None,
        "images per forward pass of each process; gradients are accumulated over a batch "
        "(default: all)",
    )
    base_lr: Positive = setting(
        1.5e-4, "learning rate per 256 images; the rate is base_lr * batch_size / 256"
    )
    weight_decay: NonNegative = setting(0.05, "AdamW weight decay (none on biases, norms)")
    beta2: OpenFraction = setting(0.95, "AdamW second-moment decay")
    clip_grad: Positive | None = setting(None, "clip the gradient to this norm")
    warmup: Fraction = setting(0.05, "share of the steps with a rising learning rate")
    min_lr: NonNegative = setting(0.0, "learning rate at the end of the cosine")
    crop_scale: Fraction = setting(0.2, "smallest random crop, as a share of the image's area")
    hflip: bool = setting(True, "flip half of the images horizontally")
    grad_checkpointing: bool = setting(
        False,
        "save memory: recompute the activations of each block in the backward pass",
        may_change=True,
    )
    strategy: Processes = setting(
        "auto",
        "with several processes, each holds the whole network (ddp) or a share of it (fsdp); "
        "auto: ddp",
        may_change=True,
    )
    log_every: Count = setting(
        20, "steps between lines of metrics.jsonl and timings.jsonl", may_change=True
    )
    workers: Workers | None = WORKERS
    save_every: Count = setting(500, "steps between checkpoints", may_change=True)
    logger: tuple[LoggerName, ...] = setting(
        (),
        "also log to tensorboard, wandb (WANDB_MODE=offline: to files) or mlflow "
        "(MLFLOW_TRACKING_URI, or mlflow.db beside the run); several with commas",
        may_change=True,
    )
    tensorboard: bool = setting(False, "the same as --logger tensorboard", may_change=True)

    @property
    def loggers(self) -> tuple[LoggerName, ...]:
        """Every logger that was asked for, once."""
        old: tuple[LoggerName, ...] = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*self.logger, *old)))


class ChosenSettings(TrainingSettings):
    """Training whose length, batch and rate fit the images and the device unless they are given."""

    epochs: Positive | None = setting(  # type: ignore[assignment]
        None, "passes over the images, fractions allowed (default: from the number of images)"
    )
    batch_size: Count | None = setting(  # type: ignore[assignment]
        None,
        "images per optimizer step, over all processes and micro-batches (default: 256, fewer for "
        "few images)",
    )
    base_lr: Positive | None = setting(  # type: ignore[assignment]
        None,
        "learning rate per 256 images; the rate is base_lr * batch_size / 256 (default: from the "
        "size of the model and the weights it starts from)",
    )


class MonitoredSettings(ChosenSettings):
    """Training whose encoder may be measured on the way, which changes nothing in it."""

    monitor: tuple[str, ...] = setting(
        (),
        "tasks (DATA arguments with labels, e.g. birds/,cars/) to score the frozen encoder on while it "
        "trains, by k-NN and by a linear probe; test images are scored as by moce probe",
        input="images",
        may_change=True,
    )
    monitor_every: Count | None = setting(
        None,
        "steps between measurements: of the tasks of --monitor, of the rank of the features (RankMe) and of "
        "pictures of reconstructions (default: ten in a run; without --monitor fewer or none, to cost "
        "1 % of the time at most)",
        may_change=True,
    )
