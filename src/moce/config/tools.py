"""Settings of the verbs around the stages: report, demo and doctor."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from moce.config.base import (
    Count,
    Folder,
    Positive,
    RuntimeSettings,
    Settings,
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
