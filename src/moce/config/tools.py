"""Settings of pack, convert, export, push, run, report, explore, demo and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moce.config.base import (
    EXPORTED,
    IMAGES,
    Accepts,
    Count,
    Data,
    DataSettings,
    Folder,
    Format,
    Positive,
    Reference,
    RunSettings,
    RuntimeSettings,
    Settings,
)
from moce.config.facts import GIVEN, setting
from moce.config.pipeline import FileSettings


def _size_to_text(value: Any) -> Any:
    """224 or (224, 192), as passed in Python, as written in a recipe."""
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return str(value) if isinstance(value, int) else value


Size = Annotated[
    str,
    Accepts("str | int | Sequence[int]"),
    BeforeValidator(_size_to_text),
    Field(pattern=r"^[1-9]\d{0,4}(x[1-9]\d{0,4})?$"),
]


class PackSettings(Settings):
    """Write images, as encoded or as pixels, to few large files that every command takes as DATA."""

    data: Data = setting(description=IMAGES, input="images")
    out: Folder | None = setting(None, "folder to write; with --size, a file such as icons.moce")
    shorter_side: Count | None = setting(
        None,
        "encode larger images again, as JPEGs of this shorter side in pixels (default: keep all "
        "images as they are encoded)",
    )
    quality: Annotated[int, Field(ge=1, le=100)] = setting(
        90, "quality of these JPEGs", used_with={"shorter_side": (GIVEN,)}
    )
    shard_size: Count = setting(500, "size of a file in the folder, in MB (10^6 bytes)")
    size: Size | None = setting(
        None,
        "write pixels to one file instead, resized and cropped to this size, one number or "
        "HEIGHTxWIDTH: for small images of one size",
    )
    channels: Count = setting(
        3,
        "channels of the pixels, as the encoder takes them: 1 (gray), 3 (color) or more",
        used_with={"size": (GIVEN,)},
    )
    overwrite: bool = setting(False, "replace the output, and what an interrupted run left")
    verify: bool = setting(
        False, "read everything back and compare checksums (without --out: those of DATA)"
    )
    workers: Count | None = setting(
        None, "images decoded at the same time (default: all usable cores)"
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        sides = [int(side) for side in (self.size or "").split("x")]
        return sides[0], sides[-1]


class ReportSettings(Settings):
    """Draw run folders as one self-contained HTML page."""

    runs: tuple[Folder, ...] = setting(description="run folders, or a folder of run folders")
    out: Folder = setting(Path("report.html"), "file to write")
    max_images: Count = setting(12, "pictures per row of a montage")


class ExploreSettings(DataSettings):
    """Show a map of a run's images in the browser, and what its experts make of yours."""

    folders = frozenset({"explore"})

    run: Folder = setting(description="run of moce train or moce cluster", input="weights")
    images: Data | None = setting(
        None, "images of the map (default: those the run was made from)", input="images"
    )
    out: Folder | None = setting(
        None, "folder for features, the map and exported backbones (default: RUN/explore)"
    )
    overwrite: bool = setting(
        False, "compute features and map again, even if they are in the folder"
    )
    host: str = setting("127.0.0.1", "address to serve the page on; others can reach 0.0.0.0")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(
        8321, "port of the page (0: any free one)"
    )
    max_images: Count = setting(100_000, "images on the map; of more, so many are drawn at random")
    projection: Literal["tsne", "pca"] = setting(
        "tsne", "from features to the map: tsne keeps neighbors together; pca is faster"
    )
    batch_size: Count = setting(128, "images per forward pass")
    prepare: bool = setting(
        False, "make the map and stop, e.g. on a machine with a GPU; the page then opens at once"
    )


class ExportSettings(FileSettings):
    """Write a trained model as a folder that another library loads."""

    proofs = frozenset({"export.json"})
    files = EXPORTED

    run: Folder = setting(
        description="run of moce train or pretrain, a customized folder, or a file of weights",
        input="weights",
    )
    out: Folder = setting(description="folder to write the model to")
    format: Format = setting("timm", "library to write the folder for")
    route: str | None = setting(
        None,
        "experts of a MoCE run, one per MoE block, e.g. 2-0 (moce customize prints them)",
    )
    strategy: Literal["route", "generalist"] = setting(
        "route", "of a MoCE run: one route, or all experts averaged (generalist)"
    )
    overwrite: bool = setting(False, "replace the contents of the output folder")


class PushSettings(Settings):
    """Push an exported folder, with its card, to the Hugging Face hub."""

    folder: Folder = setting(description="folder of moce customize or moce export")
    repo: str = setting(description="name on the hub: ORGANIZATION/NAME")
    private: bool = setting(False, "only for the organization's members")
    license: str | None = setting(None, "license of the weights, for the card, e.g. cc-by-nc-4.0")


class ConvertSettings(FileSettings):
    """Convert weights of any library that moce reads to one safetensors file."""

    weights: Folder = setting(
        description="file or folder of weights, or a run of moce", input="weights"
    )
    out: Folder = setting(
        description="file to write, FILE.safetensors, with the names of timm and "
        "facebookresearch/mae"
    )
    trust_pickle: bool = setting(
        False, "read a .pth file by pickle, which can run any code in the file"
    )
    overwrite: bool = setting(False, "replace the output file")


class PipelineSettings(RunSettings):
    """Pretrain, cluster, train experts, then customize and probe for each task: all in one."""

    proofs = frozenset({"mae", "clusters", "moce", "backbones", "probes"})
    files = frozenset({"results.json"})

    data: Data = setting(description=IMAGES, input="images")
    tasks: tuple[str, ...] = setting(
        (), "the tasks' images, each as a DATA argument, e.g. birds/,cars/", may_change=True
    )
    resume: bool = setting(
        False, "finish an interrupted run, or add tasks to a finished one", may_change=True
    )
    mae: Folder | None = setting(
        None,
        "start from this run of moce pretrain, or weights of another library, without pretraining",
        input="weights",
    )
    model: str | None = setting(None, "encoder to pretrain, as of moce pretrain")
    init: Reference | None = setting(
        None, "weights to start pretraining from, as of moce pretrain", input="weights"
    )
    epochs: Positive | None = setting(None, "epochs of pretraining, as of moce pretrain")
    pretrain: dict[str, Any] = setting({}, "further settings of moce pretrain, as YAML")
    cluster: dict[str, Any] = setting({}, "settings of moce cluster, e.g. {num_clusters: 64}")
    train: dict[str, Any] = setting({}, "settings of moce train, e.g. {num_experts: 4, epochs: 50}")
    customize: dict[str, Any] = setting({}, "settings of moce customize, e.g. {strategy: route}")
    probe: dict[str, Any] = setting({}, "settings of moce probe, e.g. {num_labels: 200}")


class DemoSettings(RuntimeSettings):
    """Run every stage on the embedded images and compare MAE, MAE+ and MoCE on six tasks."""

    proofs = frozenset(
        {"demo.json", "mae", "clusters", "moce", "mae_plus", "evaluation", "segmenter"}
    )
    files = frozenset({"report.html", "suite.yaml", "results.json"})
    folders = frozenset({"scenes"})

    out: Folder = setting(Path("runs/demo"), "folder to write the runs to")
    overwrite: bool = setting(False, "replace the contents of the output folder")
    reuse: bool = setting(
        False, "show the existing results if settings and version are the same, else run again"
    )
    dense: bool = setting(
        False,
        "show segmentation instead, in two minutes: an MAE, then a segmenter of digits and clothes "
        "pasted on photographs",
    )
    tasks: tuple[str, ...] = setting((), "tasks to run (default: all embedded ones)")
    pretrain_epochs: Positive = setting(18, "epochs of the MAE")
    train_epochs: Positive = setting(8, "epochs of MoCE and of MAE+")
    num_clusters: Count = setting(96, "clusters K")
    num_experts: Count = setting(8, "experts E per MoE block")
    num_labels: Count = setting(150, "labeled images per draw")
    draws: Count = setting(3, "draws of labels per probe")
    adapt_steps: Count = setting(100, "steps of each adaptation to a task")
    finetune_epochs: Positive = setting(16, "epochs of each fine-tune")


class DoctorSettings(Settings):
    """Check versions, devices, precision, threads and disk space, and list anything to fix."""

    out: Folder = setting(Path(), "folder to check for free disk space")
