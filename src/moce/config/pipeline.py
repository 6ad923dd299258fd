"""Settings of the stages: pretrain, cluster, train, headroom and customize."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moce.config.base import (
    IMAGES,
    BalanceScope,
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
    NonNegative,
    OpenFraction,
    Positive,
    Reference,
    ResidentSettings,
    RunSettings,
    Settings,
    Strategy,
    TrainingSettings,
)


class WeightsSettings(Settings):
    """What a verb may be told of the weights it starts from."""

    allow_missing: tuple[str, ...] = Field(
        (),
        description="patterns of weights that a file of other libraries may lack, e.g. norm.*; "
        "they start fresh",
    )
    allow_unexpected: tuple[str, ...] = Field(
        (), description="patterns of weights that such a file may have beyond the model's"
    )


class FileSettings(WeightsSettings):
    """What weights of other libraries cannot say of themselves."""

    model: str | None = Field(
        None, description="timm architecture of a weights file (default: as its tensors say)"
    )
    model_args: dict[str, Any] = Field(
        {}, description='timm model arguments for a weights file, e.g. {"num_heads": 2}'
    )
    img_size: Count | None = Field(
        None, description="image side in pixels for a weights file (default: its own)"
    )
    decoder_heads: Count | None = Field(
        None, description="attention heads of the decoder in a weights file (default: 16)"
    )


class MAESettings(FileSettings):
    """A verb that reads a masked autoencoder: a run of moce, or weights of other libraries."""

    mae: Folder = Field(
        description="run of moce pretrain, or weights of other libraries: a file, a folder, a timm name"
    )


class PretrainSettings(TrainingSettings, WeightsSettings):
    """Pre-train a masked autoencoder on unlabeled images (stage 0)."""

    data: Data = Field(description=IMAGES)
    model: str = Field("vit_base_patch16_224", description="encoder: any plain timm ViT")
    model_args: dict[str, Any] = Field(
        {}, description='timm model arguments, e.g. {"embed_dim": 128, "depth": 6}'
    )
    img_size: Count | None = Field(None, description="image side in pixels (default: the model's)")
    init: Reference | None = Field(
        None,
        description="start from a moce MAE run; weights of other libraries: a file, a folder or a "
        "timm name; or 'pretrained', the timm model's own weights",
    )
    mean: Channels = Field(
        (0.485, 0.456, 0.406),
        description="mean of the channels, 0..1, that pixels are centered on: one value or as many "
        "as the encoder takes (default for other than 3: 0.5)",
    )
    std: Deviations = Field(
        (0.229, 0.224, 0.225),
        description="deviation of the channels that pixels are scaled by (default for other than "
        "3 channels: 0.5)",
    )
    mask_ratio: OpenFraction = Field(0.75, description="share of patches hidden")
    norm_pix: bool = Field(True, description="predict pixels normalized per patch")
    decoder_dim: Count = Field(512, description="decoder width")
    decoder_depth: Count = Field(8, description="decoder blocks")
    decoder_heads: Count = Field(16, description="decoder attention heads")


class ClusterSettings(RunSettings, MAESettings, ResidentSettings):
    """Group the images into balanced clusters by an MAE's features (stage 1)."""

    data: Data = Field(description=IMAGES)
    resume: bool = Field(False, description="go on from what the output folder holds")
    num_clusters: Count = Field(256, description="number of clusters K")
    pooling: ClusterPooling = Field(
        "mean",
        description="image feature: mean of patch tokens, cls, the class token, or pixels, the mean "
        "colors of a 16 x 16 grid",
    )
    epsilon: Positive = Field(
        0.01, ge=1e-30, description="entropy weight of the balanced assignment"
    )
    update: CentroidUpdate = Field(
        "hard", description="centroids: mean of assigned images (hard) or Q-weighted mean (soft)"
    )
    marginal_tolerance: Positive = Field(
        0.01, description="largest relative error of a cluster's mass in Sinkhorn-Knopp"
    )
    max_iterations: Count = Field(
        50,
        description="most rounds of assignment and centroid update, on a sample and on all images",
    )
    chunk_size: Count = Field(4096, description="images whose scores are worked on at once")
    batch_size: Count = Field(256, description="images per forward pass")


class TrainSettings(TrainingSettings, MAESettings):
    """Train cluster-conditional experts from an MAE (stage 2), or a baseline for as long."""

    data: Data = Field(description=IMAGES)
    clusters: Folder | None = Field(
        None, description="run folder of moce cluster (not for methods mae and token_moe)"
    )
    method: Method = Field(
        "moce",
        description="moce: experts; baselines for the same steps: mae (MAE+, no experts), token_moe "
        "(the gate reads tokens), sdr (experts of clusters fixed beforehand), subset (mae on the "
        "images of one task's clusters only)",
    )
    task: Data | None = Field(None, description="the task's images (for method subset)")
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


class HeadroomSettings(TrainingSettings, MAESettings):
    """Estimate, before training experts, whether these images and this MAE leave them anything to gain."""

    data: Data = Field(description=IMAGES)
    clusters: Folder = Field(description="run folder of moce cluster")
    steps: Count | None = Field(
        800, description="optimizer steps on all images; a group alone takes its share of them"
    )
    num_groups: Count = Field(4, description="groups of clusters, each trained on alone")


class CustomizeSettings(DataSettings):
    """Pick the expert for a task and export a dense timm backbone (stage 3)."""

    run: Folder = Field(description="run folder of moce train")
    images: Data = Field(description="the task's images (labels are used by strategy probe only)")
    out: Folder = Field(description="folder to write the backbone to")
    overwrite: bool = Field(False, description="replace what is in the output folder")
    strategy: Strategy = Field(
        "auto",
        description="route: winner's experts; merge: averaged by the task's votes; "
        "generalist: by the training data's; auto: route when the winner is clear, else merge; "
        "probe: whichever classifies the images' labels best on frozen features",
    )
    threshold: Fraction = Field(0.5, description="vote share from which auto takes the winner")
    format: Format = Field("timm", description="library that the folder is for")
    assign: Literal["balanced", "nearest"] = Field(
        "balanced", description="cluster of an image: as in training, or the nearest centroid"
    )
    batch_size: Count = Field(256, description="images per forward pass")
