"""Settings of the verbs around the stages: pack, convert, export, report, demo and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moce.config.base import (
    IMAGES,
    Count,
    Data,
    Folder,
    Format,
    Positive,
    RuntimeSettings,
    Settings,
)
from moce.config.pipeline import FileSettings


def _size_text(value: Any) -> Any:
    """224 or (224, 192), as a call in Python gives them, in the way they are written in a recipe."""
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return str(value) if isinstance(value, int) else value


Size = Annotated[str, BeforeValidator(_size_text), Field(pattern=r"^[1-9]\d{0,4}(x[1-9]\d{0,4})?$")]


class PackSettings(Settings):
    """Decode and resize images once, into one file that every verb takes as DATA."""

    data: Data = Field(description=IMAGES)
    size: Size | None = Field(
        None,
        description="size in pixels, one number or HEIGHTxWIDTH; the model's input or, for crops, "
        "some 1.15 times as much",
    )
    channels: Count = Field(
        3, description="1 (gray), 3 (color) or as many as all images have; as the encoder takes"
    )
    out: Folder | None = Field(None, description="file to write, such as photos.moce")
    overwrite: bool = Field(False, description="replace the file, and what an interruption left")
    verify: bool = Field(
        False, description="read all pixels back and compare checksums; without --out those of DATA"
    )
    workers: Count | None = Field(
        None, description="images decoded at the same time (default: all usable cores)"
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        sides = [int(side) for side in (self.size or "").split("x")]
        return sides[0], sides[-1]


class ReportSettings(Settings):
    """Draw run folders as one self-contained HTML page."""

    runs: tuple[Folder, ...] = Field(description="run folders, or a folder that holds some")
    out: Folder = Field(Path("report.html"), description="file to write")
    max_images: Count = Field(12, description="pictures per row of a montage")


class ExportSettings(FileSettings):
    """Write a trained model as a folder that another library loads."""

    run: Folder = Field(
        description="run of moce train or pretrain, a customized folder, or a file of weights"
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
        False, description="read a .pth file by pickle, which runs whatever code it holds"
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
    num_labels: Count = Field(150, description="labeled images per draw")
    draws: Count = Field(3, description="draws of labels per probe")
    finetune_epochs: Positive = Field(16, description="epochs of each fine-tune")


class DoctorSettings(Settings):
    """Report versions, devices, precision, threads, disk space and what to mend."""

    out: Folder = Field(Path(), description="folder whose free disk space is looked at")
