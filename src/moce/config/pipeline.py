"""Settings of pretrain, cluster, train, headroom and customize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from moce.config.base import (
    EXPORTED,
    IMAGES,
    BalanceScope,
    CacheSettings,
    CentroidUpdate,
    Channels,
    ClusterPooling,
    Count,
    Data,
    DataSettings,
    Deviations,
    Folder,
    Format,
    Fraction,
    GateInit,
    GateScale,
    Index,
    Method,
    MonitoredSettings,
    NonNegative,
    OpenFraction,
    Positive,
    Reference,
    RunSettings,
    Settings,
    Strategy,
    TrainingSettings,
)
from moce.config.facts import GIVEN, setting


class WeightsSettings(Settings):
    """A command that reads weights of other libraries."""

    allow_missing: tuple[str, ...] = setting(
        (),
        "glob patterns of weights that may be missing, e.g. norm.*; they are initialized",
        comes_with="run",
    )
    allow_unexpected: tuple[str, ...] = setting(
        (),
        "glob patterns of unexpected weights to ignore",
        comes_with="run",
        was="allow_surplus",
    )
    weights_key: str | None = setting(
        None,
        "which network of a file that holds several, such as state_dict_ema or teacher",
        comes_with="run",
    )


class FileSettings(WeightsSettings):
    """What a file of weights does not contain."""

    model: str | None = setting(
        None,
        "timm architecture of a weights file (default: inferred from tensor shapes)",
        comes_with="run",
    )
    model_args: dict[str, Any] = setting(
        {}, 'timm model arguments for a weights file, e.g. {"num_heads": 2}', comes_with="run"
    )
    img_size: Count | None = setting(
        None, "image side in pixels for a weights file (default: its own)", comes_with="run"
    )
    decoder_heads: Count | None = setting(
        None,
        "attention heads of the decoder in a weights file (default: 16)",
        comes_with="run",
    )


class MAESettings(FileSettings):
    """A command that starts from a masked autoencoder: a run of moce, or other weights."""

    mae: Folder = setting(
        description="run of moce pretrain, or weights of another library: a file, a folder, a timm "
        "name",
        input="weights",
    )


class PretrainSettings(MonitoredSettings, WeightsSettings):
    """Pre-train a masked autoencoder on unlabeled images (stage 0)."""

    data: Data = setting(description=IMAGES, input="images")
    model: str | None = setting(
        None,
        "encoder: any plain timm ViT (default: one that fits the images and the device)",
        comes_with="run",
    )
    model_args: dict[str, Any] = setting(
        {}, 'timm model arguments, e.g. {"embed_dim": 128, "depth": 6}', comes_with="run"
    )
    img_size: Count | None = setting(
        None, "image side in pixels (default: the model's)", comes_with="run"
    )
    init: Reference | None = setting(
        None,
        "start from a moce MAE run; weights of another library: a file, a folder or a timm name; or "
        "'pretrained', the timm model's own weights",
        input="weights",
    )
    mean: Channels = setting(
        (0.485, 0.456, 0.406),
        "mean of the channels, 0..1, to normalize pixels by: one value or one per channel "
        "(default for other than 3: 0.5)",
        comes_with="run",
    )
    std: Deviations = setting(
        (0.229, 0.224, 0.225),
        "standard deviation of the channels, to normalize pixels by (default for other than "
        "3 channels: 0.5)",
        comes_with="run",
    )
    mask_ratio: OpenFraction = setting(0.75, "share of patches masked", comes_with="run")
    norm_pix: bool = setting(True, "predict pixels normalized per patch", comes_with="run")
    decoder_dim: Count = setting(512, "decoder width", comes_with="decoder")
    decoder_depth: Count = setting(8, "decoder blocks", comes_with="decoder")
    decoder_heads: Count = setting(16, "decoder attention heads", comes_with="run")


class ClusterSettings(RunSettings, MAESettings, CacheSettings):
    """Group the images into balanced clusters by an MAE's features (stage 1)."""

    files = frozenset({"assignments.parquet"})

    data: Data = setting(description=IMAGES, input="images")
    resume: bool = setting(False, "resume the run in the output folder", may_change=True)
    num_clusters: Count = setting(256, "number of clusters K")
    pooling: ClusterPooling = setting(
        "mean",
        "image feature: mean of patch tokens; cls, the class token; or pixels, the mean colors of "
        "a 16 x 16 grid",
    )
    epsilon: Annotated[Positive, Field(ge=1e-30)] = setting(
        0.005, "entropy weight of the balanced assignment"
    )
    update: CentroidUpdate = setting(
        "hard", "centroids: mean of assigned images (hard) or Q-weighted mean (soft)"
    )
    marginal_tolerance: Positive = setting(
        0.01, "largest relative error of a cluster's mass in Sinkhorn-Knopp"
    )
    max_iterations: Count = setting(
        50,
        "most iterations of assignment and centroid update, on a sample and on all images",
        was="max_rounds",
    )
    chunk_size: Count = setting(4096, "images whose scores are computed at once")
    batch_size: Count = setting(256, "images per forward pass")


class TrainSettings(MonitoredSettings, MAESettings):
    """Train cluster-conditional experts from an MAE (stage 2), or a baseline for as long."""

    data: Data = setting(description=IMAGES, input="images")
    clusters: Folder | None = setting(
        None,
        "run folder of moce cluster (not for methods mae and token_moe)",
        input="weights",
        used_with={"method": ("moce", "sdr", "subset")},
        needed=True,
    )
    method: Method = setting(
        "moce",
        "moce: experts; baselines for the same steps: mae (MAE+, no experts), token_moe (the gate "
        "reads tokens), sdr (the experts of clusters are fixed beforehand), subset (mae on the "
        "images of one task's clusters only)",
    )
    task: Data | None = setting(
        None,
        "the task's images (for method subset)",
        input="images",
        used_with={"method": ("subset",)},
        needed=True,
    )
    task_share: Fraction = setting(
        0.9,
        "share of the task's images whose clusters method subset trains on",
        used_with={"method": ("subset",)},
    )
    num_experts: Count = setting(
        8, "experts E per MoE block", used_with={"method": ("moce", "sdr", "token_moe")}
    )
    moe_blocks: tuple[Index, ...] | None = setting(
        None,
        "encoder blocks with experts, e.g. 9,11 (default: the last two odd ones)",
        used_with={"method": ("moce", "sdr", "token_moe")},
    )
    expert_scope: Literal["ffn", "block"] = setting(
        "ffn",
        "what an expert is: the block's FFN (as in the paper), or the whole block",
        used_with={"method": ("moce", "sdr")},
    )
    gate_scale: GateScale = setting(
        "straight_through",
        "scale of an expert's output: straight_through (value 1) or prob (as in the paper)",
        used_with={"method": ("moce", "sdr", "token_moe")},
    )
    gate_init: GateInit = setting(
        "centroids",
        "initialize gates from groups of centroids, or at random",
        used_with={"method": ("moce",)},
    )
    gate_confidence: OpenFraction = setting(
        0.8,
        "mean largest gate probability at the start (gate_init centroids)",
        used_with={"method": ("moce",), "gate_init": ("centroids",)},
    )
    gate_init_std: Positive = setting(
        0.02,
        "standard deviation of initial gate weights (gate_init random)",
        used_with={"method": ("moce", "token_moe"), "gate_init": ("random",)},
    )
    gate_lr_scale: Positive = setting(
        1.0,
        "learning rate of the gates over that of the other weights",
        used_with={"method": ("moce", "token_moe")},
    )
    gate_noise: bool = setting(
        True,
        "add noise N(0, 1/E^2) to gate logits in training",
        used_with={"method": ("moce",)},
    )
    shared_gate: bool = setting(
        False, "one gate, so one route, for all MoE blocks", used_with={"method": ("moce",)}
    )
    balance_weight: NonNegative = setting(
        0.01, "weight of the balance loss", used_with={"method": ("moce", "token_moe")}
    )
    imbalance_weight: NonNegative = setting(
        0.01, "weight of the imbalance loss", used_with={"method": ("moce",)}
    )
    balance_bound: Annotated[Positive, Field(ge=1)] = setting(
        2.0,
        "most images of an expert in even shares, at the start and before the balance loss sets in; "
        "1: equal shares (as in the paper)",
        before=1.0,
        used_with={"method": ("moce", "sdr")},
    )
    balance_scope: BalanceScope = setting(
        "dataset",
        "count the images of each expert over the data set's clusters or over the batch",
        used_with={"method": ("moce",)},
    )


class HeadroomSettings(TrainingSettings, MAESettings):
    """Estimate, before training experts, how much these images and this MAE could gain from them."""

    proofs = frozenset({"results.json"})

    data: Data = setting(description=IMAGES, input="images")
    clusters: Folder = setting(description="run folder of moce cluster", input="weights")
    steps: Count | None = setting(
        800,
        "optimizer steps on all images; each group alone gets its share of them",
        replaces="epochs",
    )
    num_groups: Count = setting(4, "groups of clusters, each trained on alone")


class CustomizeSettings(DataSettings, FileSettings):
    """Pick the experts for a task, adapt them to it if asked, and export a dense backbone (stage 3)."""

    proofs = frozenset({"selection.json", "adaptation.json"})
    files = EXPORTED

    run: Folder = setting(
        description="run folder of moce train; to adapt without experts: an MAE run, or weights of "
        "other libraries (a file, a folder or a timm name)",
        input="weights",
    )
    images: Data = setting(
        description="the task's images (only strategy probe uses labels)", input="images"
    )
    out: Folder = setting(description="folder to write the backbone to")
    overwrite: bool = setting(False, "replace the contents of the output folder")
    strategy: Strategy = setting(
        "auto",
        "route: the winner's experts; merge: averaged by the task's votes; generalist: averaged by "
        "the training data's; auto: generalist if the images are unlike the training data, else route "
        "if the winner is clear, else merge; probe: whichever "
        "classifies the images' labels best on frozen features",
    )
    threshold: Fraction = setting(
        0.9,
        "vote share from which auto takes the winner",
        used_with={"strategy": ("auto",)},
    )
    format: Format = setting("timm", "library to write the folder for")
    adapt_steps: Literal["auto"] | Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        0,
        "continue masked autoencoding on the task's images for so many steps (test images never, "
        "labels unused); auto: 700, or more for over 9,000 images",
    )
    data: Data | None = setting(
        None,
        "pool to adapt on as well: images of the task's clusters are drawn from it",
        input="images",
        used_with={"adapt_steps": (GIVEN,)},
    )
    clusters: Folder | None = setting(
        None,
        "run folder of moce cluster, to find related images of the pool (default: a MoCE run's own)",
        input="weights",
        used_with={"data": (GIVEN,)},
    )
    pool_share: OpenFraction = setting(
        0.5,
        "share of the pool's images in a batch",
        used_with={"data": (GIVEN,)},
    )
    adapt_batch_size: Count = setting(
        128, "images per optimizer step", used_with={"adapt_steps": (GIVEN,)}
    )
    adapt_lr: Positive | None = setting(
        None,
        "base learning rate per 256 images (default: half of the run's; 7.5e-5 for other weights)",
        used_with={"adapt_steps": (GIVEN,)},
    )
    resume: bool = setting(
        False,
        "resume an interrupted adaptation",
        may_change=True,
        used_with={"adapt_steps": (GIVEN,)},
    )
    assign: Literal["balanced", "nearest"] = setting(
        "balanced",
        "cluster of an image: as in training, or the nearest centroid",
        used_with={"strategy": ("auto", "route", "merge", "generalist")},
    )
    batch_size: Count = setting(
        256,
        "images per forward pass",
        used_with={"strategy": ("auto", "route", "merge", "generalist")},
    )


class AdaptationSettings(TrainingSettings):
    """What `moce customize --adapt-steps` trains with, as the backbone's config.yaml records it."""

    run: Folder = setting(description="where the backbone comes from", input="weights")
    choice: str | None = setting(None, "strategy of the choice of experts (None: an MAE)")
    images: Data = setting(description="the task's images", input="images")
    data: Data | None = setting(None, "pool of related images", input="images")
    clusters: Folder | None = setting(None, "run folder of moce cluster", input="weights")
    pool_share: Fraction = setting(0.5, "share of the pool's images in a batch")
