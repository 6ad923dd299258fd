"""Settings of the verbs around the stages: report, demo and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moce.config.base import (
    Count,
    Folder,
    Format,
    Positive,
    RuntimeSettings,
    Settings,
)


class ReportSettings(Settings):
    """Draw run folders as one self-contained HTML page."""

    runs: tuple[Folder, ...] = Field(description="run folders, or a folder that holds some")
    out: Folder = Field(Path("report.html"), description="file to write")
    max_images: Count = Field(12, description="pictures per row of a montage")


class ExportSettings(Settings):
    """Write a trained model as a folder that another library loads."""

    run: Folder = Field(
        description="run of moce train or pretrain, a customised folder, or a file of weights"
    )
    out: Folder = Field(description="folder to write the model to")
    format: Format = Field("timm", description="library that the folder is for")
    route: str | None = Field(
        None,
        description="experts of a MoCE run, one per MoE block, e.g. 2-0 (moce customize names them)",
    )
    strategy: Literal["route", "generalist"] = Field(
        "route", description="of a MoCE run: one route, or all experts averaged (generalist)"
    )
    overwrite: bool = Field(False, description="replace what is in the output folder")


class ConvertSettings(Settings):
    """Convert weights of any library that moce reads to one safetensors file."""

    weights: Folder = Field(description="file or folder of weights, or a run of moce")
    out: Folder = Field(
        description="file to write, FILE.safetensors: names of timm and facebookresearch/mae"
    )
    trust_pickle: bool = Field(
        False, description="read by pickle, which runs whatever code the file holds"
    )
    overwrite: bool = Field(False, description="replace the output file")


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
