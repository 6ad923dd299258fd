"""Made by tools/build_stub.py from the settings classes in moce/config; do not edit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moce.commands.cluster import ClusterResult
from moce.commands.convert import ConvertResult
from moce.commands.customize import CustomizeResult
from moce.commands.demo import DemoResult
from moce.commands.distill import DistillResult
from moce.commands.doctor import DoctorResult
from moce.commands.embed import EmbedResult
from moce.commands.evaluate import EvaluateResult
from moce.commands.explore import ExploreResult
from moce.commands.export import ExportResult
from moce.commands.finetune import FinetuneResult
from moce.commands.headroom import HeadroomResult
from moce.commands.pack import PackResult
from moce.commands.predict import PredictResult
from moce.commands.pretrain import PretrainResult
from moce.commands.probe import ProbeResult
from moce.commands.push import PushResult
from moce.commands.report import ReportResult
from moce.commands.run import RunResult
from moce.commands.train import TrainResult
from moce.customization.bank import Bank
from moce.errors import MoceError as MoceError

Data = str | Path | Sequence[str | Path]  # a DATA argument, or several sources

__version__: str
__all__: list[str]

def load(run: str | Path) -> Bank:
    """Load a `moce train` run, ready to `.select` and `.customize`."""

def cluster(
    data: Data,
    *,
    mae: str | Path,
    out: str | Path,
    cache_on_gpu: bool = True,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    decoder_heads: int | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    resume: bool = False,
    num_clusters: int = 256,
    pooling: Literal["mean", "cls", "pixels"] = "mean",
    epsilon: float = 0.005,
    update: Literal["hard", "soft"] = "hard",
    marginal_tolerance: float = 0.01,
    max_iterations: int = 50,
    chunk_size: int = 4096,
    batch_size: int = 256,
) -> ClusterResult:
    """Group the images into balanced clusters by an MAE's features (stage 1).

    Args:
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        mae (str | Path): run of moce pretrain, or weights of another library: a file, a folder, a
            timm name
        out (str | Path): folder to write the run to
        cache_on_gpu (bool, default True): keep the data (pixels, or features when clustering) on
            the GPU if they take at most a quarter of its free memory
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        model (str | None, default None): timm architecture of a weights file (default: inferred
            from tensor shapes)
        model_args (dict[str, Any], default {}): timm model arguments for a weights file, e.g.
            {"num_heads": 2}
        img_size (int | None, default None): image side in pixels for a weights file (default: its
            own)
        decoder_heads (int | None, default None): attention heads of the decoder in a weights file
            (default: 16)
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        resume (bool, default False): resume the run in the output folder
        num_clusters (int, default 256): number of clusters K
        pooling (Literal['mean', 'cls', 'pixels'], default 'mean'): image feature: mean of patch
            tokens; cls, the class token; or pixels, the mean colors of a 16 x 16 grid
        epsilon (float, default 0.005): entropy weight of the balanced assignment
        update (Literal['hard', 'soft'], default 'hard'): centroids: mean of assigned images (hard)
            or Q-weighted mean (soft)
        marginal_tolerance (float, default 0.01): largest relative error of a cluster's mass in
            Sinkhorn-Knopp
        max_iterations (int, default 50): most iterations of assignment and centroid update, on a
            sample and on all images
        chunk_size (int, default 4096): images whose scores are computed at once
        batch_size (int, default 256): images per forward pass
    """

def convert(
    weights: str | Path,
    *,
    out: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    decoder_heads: int | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
) -> ConvertResult:
    """Convert weights of any library that moce reads to one safetensors file.

    Args:
        weights (str | Path): file or folder of weights, or a run of moce
        out (str | Path): file to write, FILE.safetensors, with the names of timm and
            facebookresearch/mae
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        model (str | None, default None): timm architecture of a weights file (default: inferred
            from tensor shapes)
        model_args (dict[str, Any], default {}): timm model arguments for a weights file, e.g.
            {"num_heads": 2}
        img_size (int | None, default None): image side in pixels for a weights file (default: its
            own)
        decoder_heads (int | None, default None): attention heads of the decoder in a weights file
            (default: 16)
        trust_pickle (bool, default False): read a .pth file by pickle, which can run any code in
            the file
        overwrite (bool, default False): replace the output file
    """

def customize(
    run: str | Path,
    images: Data,
    *,
    out: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    decoder_heads: int | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    strategy: Literal["auto", "route", "merge", "generalist", "probe"] = "auto",
    threshold: float = 0.9,
    format: Literal["timm", "transformers", "torch", "onnx"] = "timm",
    adapt_steps: Literal["auto"] | int = 0,
    data: Data | None = None,
    clusters: str | Path | None = None,
    pool_share: float = 0.5,
    adapt_batch_size: int = 128,
    adapt_lr: float | None = None,
    resume: bool = False,
    assign: Literal["balanced", "nearest"] = "balanced",
    batch_size: int = 256,
) -> CustomizeResult:
    """Pick the experts for a task, adapt them to it if asked, and export a dense backbone (stage 3).

    Args:
        run (str | Path): run folder of moce train; to adapt without experts: an MAE run, or weights
            of other libraries (a file, a folder or a timm name)
        images (Data): the task's images (only strategy probe uses labels)
        out (str | Path): folder to write the backbone to
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        model (str | None, default None): timm architecture of a weights file (default: inferred
            from tensor shapes)
        model_args (dict[str, Any], default {}): timm model arguments for a weights file, e.g.
            {"num_heads": 2}
        img_size (int | None, default None): image side in pixels for a weights file (default: its
            own)
        decoder_heads (int | None, default None): attention heads of the decoder in a weights file
            (default: 16)
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        strategy (Literal['auto', 'route', 'merge', 'generalist', 'probe'], default 'auto'): route:
            the winner's experts; merge: averaged by the task's votes; generalist: averaged by the
            training data's; auto: generalist if the images are unlike the training data, else route
            if the winner is clear, else merge; probe: whichever classifies the images' labels best
            on frozen features
        threshold (float, default 0.9): vote share from which auto takes the winner
        format (Literal['timm', 'transformers', 'torch', 'onnx'], default 'timm'): library to write
            the folder for
        adapt_steps (Literal['auto'] | int, default 0): continue masked autoencoding on the task's
            images for so many steps (test images never, labels unused); auto: 700, or more for over
            9,000 images
        data (Data | None, default None): pool to adapt on as well: images of the task's clusters
            are drawn from it
        clusters (str | Path | None, default None): run folder of moce cluster, to find related
            images of the pool (default: a MoCE run's own)
        pool_share (float, default 0.5): share of the pool's images in a batch
        adapt_batch_size (int, default 128): images per optimizer step
        adapt_lr (float | None, default None): base learning rate per 256 images (default: half of
            the run's; 7.5e-5 for other weights)
        resume (bool, default False): resume an interrupted adaptation
        assign (Literal['balanced', 'nearest'], default 'balanced'): cluster of an image: as in
            training, or the nearest centroid
        batch_size (int, default 256): images per forward pass
    """

def demo(
    *,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    out: str | Path = "runs/demo",
    overwrite: bool = False,
    reuse: bool = False,
    dense: bool = False,
    tasks: Sequence[str] = (),
    pretrain_epochs: float = 18,
    train_epochs: float = 8,
    num_clusters: int = 96,
    num_experts: int = 8,
    num_labels: int = 150,
    draws: int = 3,
    adapt_steps: int = 100,
    finetune_epochs: float = 16,
) -> DemoResult:
    """Run every stage on the embedded images and compare MAE, MAE+ and MoCE on six tasks.

    Args:
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        out (str | Path, default 'runs/demo'): folder to write the runs to
        overwrite (bool, default False): replace the contents of the output folder
        reuse (bool, default False): show the existing results if settings and version are the same,
            else run again
        dense (bool, default False): show segmentation instead, in two minutes: an MAE, then a
            segmenter of digits and clothes pasted on photographs
        tasks (Sequence[str], default ()): tasks to run (default: all embedded ones)
        pretrain_epochs (float, default 18): epochs of the MAE
        train_epochs (float, default 8): epochs of MoCE and of MAE+
        num_clusters (int, default 96): clusters K
        num_experts (int, default 8): experts E per MoE block
        num_labels (int, default 150): labeled images per draw
        draws (int, default 3): draws of labels per probe
        adapt_steps (int, default 100): steps of each adaptation to a task
        finetune_epochs (float, default 16): epochs of each fine-tune
    """

def distill(
    backbone: str | Path,
    data: Data,
    *,
    out: str | Path,
    cache_on_gpu: bool = True,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    resume: bool = False,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batch_size: Literal["auto"] | int | None = "auto",
    base_lr: float = 0.001,
    weight_decay: float = 0.05,
    beta2: float = 0.95,
    clip_grad: float | None = None,
    warmup: float = 0.05,
    min_lr: float = 0.0,
    crop_scale: float = 0.2,
    hflip: bool = True,
    grad_checkpointing: bool = False,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log_every: int = 20,
    workers: int | None = None,
    save_every: int = 500,
    logger: Sequence[Literal["tensorboard", "wandb", "mlflow"]] = (),
    tensorboard: bool = False,
    monitor: Sequence[str] = (),
    monitor_every: int | None = None,
    model: str = "vit_tiny_patch16_224",
    model_args: dict[str, Any] = {},
    patch_weight: float = 1.0,
) -> DistillResult:
    """Train a small student to have the features of a backbone, on unlabeled images.

    Args:
        backbone (str | Path): backbone: a customized folder, a run of moce pretrain or finetune,
            weights of another library (a file or a folder) or a timm name
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        out (str | Path): folder to write the run to
        cache_on_gpu (bool, default True): keep the data (pixels, or features when clustering) on
            the GPU if they take at most a quarter of its free memory
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        resume (bool, default False): resume from the last checkpoint in the output folder
        epochs (float | None, default None): passes over the images, fractions allowed (default:
            from the number of images)
        steps (int | None, default None): optimizer steps (default: from epochs)
        batch_size (int | None, default None): images per optimizer step, over all processes and
            micro-batches (default: 256, fewer for few images)
        micro_batch_size (Literal['auto'] | int | None, default 'auto'): images per forward pass of
            each process; gradients are accumulated over a batch. auto: as many as a GPU's memory
            holds, found by trying and recorded; 256 on a CPU and with fsdp
        base_lr (float, default 0.001): learning rate per 256 images; the rate is base_lr *
            batch_size / 256
        weight_decay (float, default 0.05): AdamW weight decay (none on biases, norms)
        beta2 (float, default 0.95): AdamW second-moment decay
        clip_grad (float | None, default None): clip the gradient to this norm
        warmup (float, default 0.05): share of the steps with a rising learning rate
        min_lr (float, default 0.0): learning rate at the end of the cosine
        crop_scale (float, default 0.2): smallest random crop, as a share of the image's area
        hflip (bool, default True): flip half of the images horizontally
        grad_checkpointing (bool, default False): save memory: recompute the activations of each
            block in the backward pass
        strategy (Literal['auto', 'ddp', 'fsdp'], default 'auto'): with several processes, each
            holds the whole network (ddp) or a share of it (fsdp); auto: ddp
        log_every (int, default 20): steps between lines of metrics.jsonl and timings.jsonl
        workers (int | None, default None): processes that read and crop images ahead of their use
            (default: one per core, divided among the training processes of a machine; 0: none
            beside the training process)
        save_every (int, default 500): steps between checkpoints
        logger (Sequence[Literal['tensorboard', 'wandb', 'mlflow']], default ()): also log to
            tensorboard, wandb (WANDB_MODE=offline: to files) or mlflow (MLFLOW_TRACKING_URI, or
            mlflow.db beside the run); several with commas
        tensorboard (bool, default False): the same as --logger tensorboard
        monitor (Sequence[str], default ()): tasks (DATA arguments with labels, e.g. birds/,cars/)
            to score the frozen encoder on while it trains, by k-NN and by a linear probe; test
            images are scored as by moce probe
        monitor_every (int | None, default None): steps between measurements: of the tasks of
            --monitor, of the rank of the features (RankMe) and of pictures of reconstructions
            (default: ten in a run; without --monitor fewer or none, to cost 1 % of the time at
            most)
        model (str, default 'vit_tiny_patch16_224'): student: any timm model
        model_args (dict[str, Any], default {}): timm model arguments, e.g. {"embed_dim": 128,
            "depth": 6}; a plain ViT takes img_size and patch_size from the backbone unless they are
            given
        patch_weight (float, default 1.0): weight of the patches' squared error beside the pooled
            features' 1 - cosine
    """

def doctor(*, out: str | Path = ".") -> DoctorResult:
    """Check versions, devices, precision, threads and disk space, and list anything to fix.

    Args:
        out (str | Path, default '.'): folder to check for free disk space
    """

def embed(
    backbone: str | Path,
    data: Data,
    *,
    out: str | Path,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    pooling: Literal["mean", "cls"] = "mean",
    batch_size: int = 256,
    overwrite: bool = False,
) -> EmbedResult:
    """Write one feature per image to a parquet file: columns id, label, split, embedding.

    Args:
        backbone (str | Path): backbone: a customized folder, a run of moce pretrain or finetune,
            weights of another library (a file or a folder) or a timm name
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        out (str | Path): file to write, FILE.parquet
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        pooling (Literal['mean', 'cls'], default 'mean'): feature: mean of patch tokens, or cls, the
            class token
        batch_size (int, default 256): images per forward pass
        overwrite (bool, default False): replace the output file
    """

def evaluate(
    suite: str | Path,
    *,
    out: str | Path,
    backbones: Sequence[str],
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    protocols: Sequence[Literal["linear", "knn", "finetune"]] = ("linear",),
    tasks: Sequence[str] = (),
    role: Literal["development", "held_out"] | None = None,
    root: str | Path = ".",
    draws: int | None = None,
    finetune_draws: int = 1,
    adapt_steps: Literal["auto"] | int = "auto",
    adapt_data: Data | None = None,
    adapt_clusters: str | Path | None = None,
    adapt_pool_share: float = 0.5,
    adapt_batch_size: int = 128,
    adapt_lr: float | None = None,
    resume: bool = False,
) -> EvaluateResult:
    """Compare backbones, and MoCE runs customized for each task, on a suite of labeled tasks.

    Args:
        suite (str | Path): YAML file of tasks, e.g. recipes/suites/paper11.yaml
        out (str | Path): folder to write the run to
        backbones (Sequence[str]): what to compare, NAME=REFERENCE each; for a MoCE run also
            NAME=RUN@SELECTION, one of auto, route, merge, generalist, probe (by labels), random
            (route), best_route and best_strategy (on the other half of the test images);
            NAME=REFERENCE@adapt adapts a masked autoencoder to each task, NAME=RUN@auto+adapt the
            experts that a strategy chooses
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        protocols (Sequence[Literal['linear', 'knn', 'finetune']], default ('linear',)): linear and
            knn probes on frozen features, finetune
        tasks (Sequence[str], default ()): tasks of the suite to run (default: all)
        role (Literal['development', 'held_out'] | None, default None): only the suite's tasks of
            this role
        root (str | Path, default '.'): folder that relative paths of the suite start from
        draws (int | None, default None): random draws of the labels (default: the suite's)
        finetune_draws (int, default 1): how many of these draws to fine-tune on
        adapt_steps (Literal['auto'] | int, default 'auto'): optimizer steps of adaptation (@adapt)
            on the training images of a task; auto: as moce customize
        adapt_data (Data | None, default None): pool to adapt on as well: images of the task's
            clusters are drawn from it
        adapt_clusters (str | Path | None, default None): run folder of moce cluster, to find
            related images of the pool (default: a MoCE run's own)
        adapt_pool_share (float, default 0.5): share of the pool's images in a batch of adaptation
        adapt_batch_size (int, default 128): images per optimizer step of adaptation
        adapt_lr (float | None, default None): base learning rate of adaptation per 256 images
            (default: half of the run's; 7.5e-5 for other weights)
        resume (bool, default False): resume an interrupted evaluation
    """

def explore(
    run: str | Path,
    images: Data | None = None,
    *,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    out: str | Path | None = None,
    overwrite: bool = False,
    host: str = "127.0.0.1",
    port: int = 8321,
    max_images: int = 100000,
    projection: Literal["tsne", "pca"] = "tsne",
    batch_size: int = 128,
    prepare: bool = False,
) -> ExploreResult:
    """Show a map of a run's images in the browser, and what its experts make of yours.

    Args:
        run (str | Path): run of moce train or moce cluster
        images (Data | None, default None): images of the map (default: those the run was made from)
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        out (str | Path | None, default None): folder for features, the map and exported backbones
            (default: RUN/explore)
        overwrite (bool, default False): compute features and map again, even if they are in the
            folder
        host (str, default '127.0.0.1'): address to serve the page on; others can reach 0.0.0.0
        port (int, default 8321): port of the page (0: any free one)
        max_images (int, default 100000): images on the map; of more, so many are drawn at random
        projection (Literal['tsne', 'pca'], default 'tsne'): from features to the map: tsne keeps
            neighbors together; pca is faster
        batch_size (int, default 128): images per forward pass
        prepare (bool, default False): make the map and stop, e.g. on a machine with a GPU; the page
            then opens at once
    """

def export(
    run: str | Path,
    *,
    out: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    decoder_heads: int | None = None,
    format: Literal["timm", "transformers", "torch", "onnx"] = "timm",
    route: str | None = None,
    strategy: Literal["route", "generalist"] = "route",
    overwrite: bool = False,
) -> ExportResult:
    """Write a trained model as a folder that another library loads.

    Args:
        run (str | Path): run of moce train or pretrain, a customized folder, or a file of weights
        out (str | Path): folder to write the model to
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        model (str | None, default None): timm architecture of a weights file (default: inferred
            from tensor shapes)
        model_args (dict[str, Any], default {}): timm model arguments for a weights file, e.g.
            {"num_heads": 2}
        img_size (int | None, default None): image side in pixels for a weights file (default: its
            own)
        decoder_heads (int | None, default None): attention heads of the decoder in a weights file
            (default: 16)
        format (Literal['timm', 'transformers', 'torch', 'onnx'], default 'timm'): library to write
            the folder for
        route (str | None, default None): experts of a MoCE run, one per MoE block, e.g. 2-0 (moce
            customize prints them)
        strategy (Literal['route', 'generalist'], default 'route'): of a MoCE run: one route, or all
            experts averaged (generalist)
        overwrite (bool, default False): replace the contents of the output folder
    """

def finetune(
    backbone: str | Path,
    data: Data,
    *,
    out: str | Path,
    task: Literal["classify", "detect", "segment"] | None = None,
    annotations: str | Path | None = None,
    ignore_index: int | None = None,
    image_size: int | None = None,
    jitter: Sequence[float] = (),
    window: int = 0,
    masks: bool = True,
    head_args: dict[str, Any] = {},
    cache_on_gpu: bool = True,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    resume: bool = False,
    epochs: float = 100,
    steps: int | None = None,
    batch_size: int = 1024,
    micro_batch_size: Literal["auto"] | int | None = "auto",
    base_lr: float = 0.0005,
    weight_decay: float = 0.05,
    beta2: float = 0.999,
    clip_grad: float | None = None,
    warmup: float = 0.05,
    min_lr: float = 1e-06,
    crop_scale: float = 0.08,
    hflip: bool = True,
    grad_checkpointing: bool = False,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log_every: int = 20,
    workers: int | None = None,
    save_every: int = 500,
    logger: Sequence[Literal["tensorboard", "wandb", "mlflow"]] = (),
    tensorboard: bool = False,
    num_labels: int | None = None,
    draw: int = 0,
    metric: Literal["accuracy", "mean_per_class", "map11"] | None = None,
    lr_grid: Sequence[float] = (),
    val_share: float = 0.2,
    keep_best: bool = False,
    patience: int | None = None,
    ema: float = 0.0,
    freeze: Literal["backbone"] | int = 0,
    lora: int | None = None,
    lora_alpha: int | None = None,
    lora_targets: Sequence[Literal["attn", "mlp"]] = ("attn", "mlp"),
    class_weights: Literal["none", "balanced"] = "none",
    sampling: Literal["shuffled", "balanced"] = "shuffled",
    layer_decay: float = 0.65,
    drop_path: float = 0.1,
    rand_augment: str = "rand-m9-mstd0.5-inc1",
    random_erasing: float = 0.25,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    smoothing: float = 0.1,
) -> FinetuneResult:
    """Train a backbone end to end on a labeled task: to classify, to detect or to segment.

    Args:
        backbone (str | Path): backbone: a customized folder, a run of moce pretrain or finetune,
            weights of another library (a file or a folder) or a timm name
        data (Data): labeled images: class folders (train/ and test/ if split), or another source
            with labels
        out (str | Path): folder to write the run to
        task (Literal['classify', 'detect', 'segment'] | None, default None): what to train for:
            classify, detect (boxes, and masks if there are any) or segment (a class for every
            pixel) (default: what the labels say)
        annotations (str | Path | None, default None): where the boxes or masks are, if not beside
            the images: a COCO JSON file or a folder
        ignore_index (int | None, default None): value of masks that neither trains nor counts,
            beside 255
        image_size (int | None, default None): side in pixels of the square that the network sees;
            position embeddings are resampled (default: 1024 to detect, 512 to segment)
        jitter (Sequence[float], default ()): least and greatest factor by which images are resized
            before they are cropped to image_size (default: 0.1,2 to detect, 0.5,2 to segment)
        window (int, default 0): side in patches of the windows to which all blocks but four
            restrict attention (0: none); has to divide the grid of patches
        masks (bool, default True): learn masks, too, where the labels have them
        head_args (dict[str, Any], default {}): of the head; detect: dim (256), scales of the
            pyramid ([4, 2, 1, 0.5]), anchor_scale (8, side of an anchor over the stride of its
            level), depth (4, convolutions), proposals (512, per image to train on); segment: kind
            (upernet or linear), dim (512)
        cache_on_gpu (bool, default True): keep the data (pixels, or features when clustering) on
            the GPU if they take at most a quarter of its free memory
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        resume (bool, default False): resume from the last checkpoint in the output folder
        epochs (float, default 100): passes over the images, fractions allowed; 50 from ViT-L on
        steps (int | None, default None): optimizer steps (default: from epochs)
        batch_size (int, default 1024): images per optimizer step, over all micro-batches
        micro_batch_size (Literal['auto'] | int | None, default 'auto'): images per forward pass of
            each process; gradients are accumulated over a batch. auto: as many as a GPU's memory
            holds, found by trying and recorded; 256 on a CPU and with fsdp
        base_lr (float, default 0.0005): learning rate per 256 images; the rate is base_lr *
            batch_size / 256; 1e-3 from ViT-L on
        weight_decay (float, default 0.05): AdamW weight decay (none on biases, norms)
        beta2 (float, default 0.999): AdamW second-moment decay
        clip_grad (float | None, default None): clip the gradient to this norm
        warmup (float, default 0.05): share of the steps with a rising learning rate; 0.1 from ViT-L
            on
        min_lr (float, default 1e-06): learning rate at the end of the cosine
        crop_scale (float, default 0.08): smallest random crop, as a share of the image's area
        hflip (bool, default True): flip half of the images horizontally
        grad_checkpointing (bool, default False): save memory: recompute the activations of each
            block in the backward pass
        strategy (Literal['auto', 'ddp', 'fsdp'], default 'auto'): with several processes, each
            holds the whole network (ddp) or a share of it (fsdp); auto: ddp
        log_every (int, default 20): steps between lines of metrics.jsonl and timings.jsonl
        workers (int | None, default None): processes that read and crop images ahead of their use
            (default: one per core, divided among the training processes of a machine; 0: none
            beside the training process)
        save_every (int, default 500): steps between checkpoints
        logger (Sequence[Literal['tensorboard', 'wandb', 'mlflow']], default ()): also log to
            tensorboard, wandb (WANDB_MODE=offline: to files) or mlflow (MLFLOW_TRACKING_URI, or
            mlflow.db beside the run); several with commas
        tensorboard (bool, default False): the same as --logger tensorboard
        num_labels (int | None, default None): labeled images to train on (default: all)
        draw (int, default 0): which random draw of the labels, as numbered by moce probe
        metric (Literal['accuracy', 'mean_per_class', 'map11'] | None, default None): accuracy,
            mean_per_class or map11 (default: map11 where an image can have several labels, else
            accuracy)
        lr_grid (Sequence[float], default ()): base_lr values to choose from: each is trained on
            some of the training images and scored on the rest, then the best is trained on all of
            them
        val_share (float, default 0.2): share of the training images that lr_grid or keep_best
            scores
        keep_best (bool, default False): hold out val_share of the training images, score them at
            every line of metrics.jsonl (by default once an epoch) and keep the best weights
        patience (int | None, default None): stop after so many scores without a better one
        ema (float, default 0.0): decay of a moving average of the weights, which then is validated,
            scored and saved (0: none), e.g. 0.998
        freeze (Literal['backbone'] | int, default 0): train only what follows the first N blocks;
            backbone: only the new head
        lora (int | None, default None): train adapters of this rank (LoRA) beside the linear layers
            of the frozen blocks, and the head; base_lr then is 5e-3 and layer_decay 1 unless given
        lora_alpha (int | None, default None): the adapters' product is scaled by lora_alpha / lora
            (default: by 1)
        lora_targets (Sequence[Literal['attn', 'mlp']], default ('attn', 'mlp')): which linear
            layers of a block have adapters: attn, mlp or both
        class_weights (Literal['none', 'balanced'], default 'none'): weight of a class in the loss
            (one label per image); balanced: inverse to its images
        sampling (Literal['shuffled', 'balanced'], default 'shuffled'): shuffled: every training
            image once an epoch; balanced: as many images of each class as of any other (one label
            per image)
        layer_decay (float, default 0.65): learning rate of a block over that of the next; 0.75 from
            ViT-L on
        drop_path (float, default 0.1): stochastic depth rate of the last block; ViT-L 0.2, ViT-H
            0.3
        rand_augment (str, default 'rand-m9-mstd0.5-inc1'): timm's RandAugment policy, applied image
            by image on the CPU ('': off)
        random_erasing (float, default 0.25): probability that a rectangle of an image is replaced
            by noise
        mixup (float, default 0.8): mixup alpha (0: off)
        cutmix (float, default 1.0): cutmix alpha (0: off)
        smoothing (float, default 0.1): label smoothing (one label per image)
    """

def headroom(
    data: Data,
    *,
    mae: str | Path,
    out: str | Path,
    clusters: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    decoder_heads: int | None = None,
    cache_on_gpu: bool = True,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    resume: bool = False,
    epochs: float = 400,
    steps: int | None = 800,
    batch_size: int = 256,
    micro_batch_size: Literal["auto"] | int | None = "auto",
    base_lr: float = 0.00015,
    weight_decay: float = 0.05,
    beta2: float = 0.95,
    clip_grad: float | None = None,
    warmup: float = 0.05,
    min_lr: float = 0.0,
    crop_scale: float = 0.2,
    hflip: bool = True,
    grad_checkpointing: bool = False,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log_every: int = 20,
    workers: int | None = None,
    save_every: int = 500,
    logger: Sequence[Literal["tensorboard", "wandb", "mlflow"]] = (),
    tensorboard: bool = False,
    num_groups: int = 4,
) -> HeadroomResult:
    """Estimate, before training experts, how much these images and this MAE could gain from them.

    Args:
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        mae (str | Path): run of moce pretrain, or weights of another library: a file, a folder, a
            timm name
        out (str | Path): folder to write the run to
        clusters (str | Path): run folder of moce cluster
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        model (str | None, default None): timm architecture of a weights file (default: inferred
            from tensor shapes)
        model_args (dict[str, Any], default {}): timm model arguments for a weights file, e.g.
            {"num_heads": 2}
        img_size (int | None, default None): image side in pixels for a weights file (default: its
            own)
        decoder_heads (int | None, default None): attention heads of the decoder in a weights file
            (default: 16)
        cache_on_gpu (bool, default True): keep the data (pixels, or features when clustering) on
            the GPU if they take at most a quarter of its free memory
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        resume (bool, default False): resume from the last checkpoint in the output folder
        epochs (float, default 400): passes over the images (fractions allowed)
        steps (int | None, default 800): optimizer steps on all images; each group alone gets its
            share of them
        batch_size (int, default 256): images per optimizer step, over all processes and
            micro-batches
        micro_batch_size (Literal['auto'] | int | None, default 'auto'): images per forward pass of
            each process; gradients are accumulated over a batch. auto: as many as a GPU's memory
            holds, found by trying and recorded; 256 on a CPU and with fsdp
        base_lr (float, default 0.00015): learning rate per 256 images; the rate is base_lr *
            batch_size / 256
        weight_decay (float, default 0.05): AdamW weight decay (none on biases, norms)
        beta2 (float, default 0.95): AdamW second-moment decay
        clip_grad (float | None, default None): clip the gradient to this norm
        warmup (float, default 0.05): share of the steps with a rising learning rate
        min_lr (float, default 0.0): learning rate at the end of the cosine
        crop_scale (float, default 0.2): smallest random crop, as a share of the image's area
        hflip (bool, default True): flip half of the images horizontally
        grad_checkpointing (bool, default False): save memory: recompute the activations of each
            block in the backward pass
        strategy (Literal['auto', 'ddp', 'fsdp'], default 'auto'): with several processes, each
            holds the whole network (ddp) or a share of it (fsdp); auto: ddp
        log_every (int, default 20): steps between lines of metrics.jsonl and timings.jsonl
        workers (int | None, default None): processes that read and crop images ahead of their use
            (default: one per core, divided among the training processes of a machine; 0: none
            beside the training process)
        save_every (int, default 500): steps between checkpoints
        logger (Sequence[Literal['tensorboard', 'wandb', 'mlflow']], default ()): also log to
            tensorboard, wandb (WANDB_MODE=offline: to files) or mlflow (MLFLOW_TRACKING_URI, or
            mlflow.db beside the run); several with commas
        tensorboard (bool, default False): the same as --logger tensorboard
        num_groups (int, default 4): groups of clusters, each trained on alone
    """

def pack(
    data: Data,
    *,
    out: str | Path | None = None,
    shorter_side: int | None = None,
    quality: int = 90,
    shard_size: int = 500,
    size: str | int | Sequence[int] | None = None,
    channels: int = 3,
    overwrite: bool = False,
    verify: bool = False,
    workers: int | None = None,
) -> PackResult:
    """Write images, as encoded or as pixels, to few large files that every command takes as DATA.

    Args:
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        out (str | Path | None, default None): folder to write; with --size, a file such as
            icons.moce
        shorter_side (int | None, default None): encode larger images again, as JPEGs of this
            shorter side in pixels (default: keep all images as they are encoded)
        quality (int, default 90): quality of these JPEGs
        shard_size (int, default 500): size of a file in the folder, in MB (10^6 bytes)
        size (str | int | Sequence[int] | None, default None): write pixels to one file instead,
            resized and cropped to this size, one number or HEIGHTxWIDTH: for small images of one
            size
        channels (int, default 3): channels of the pixels, as the encoder takes them: 1 (gray), 3
            (color) or more
        overwrite (bool, default False): replace the output, and what an interrupted run left
        verify (bool, default False): read everything back and compare checksums (without --out:
            those of DATA)
        workers (int | None, default None): images decoded at the same time (default: all usable
            cores)
    """

def predict(
    model: str | Path,
    data: Data,
    *,
    out: str | Path,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    min_score: float = 0.05,
    pictures: int = 16,
    picture_score: float = 0.5,
    format: Literal["csv", "jsonl", "parquet"] = "csv",
    top_k: int = 1,
    batch_size: int = 8,
    overwrite: bool = False,
) -> PredictResult:
    """Apply a fine-tuned model to images: COCO JSON, mask PNGs or a table of classes, and pictures.

    Args:
        model (str | Path): folder that moce finetune wrote
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        out (str | Path): folder to write the predictions to
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        min_score (float, default 0.05): detections with a lower score are not written
        pictures (int, default 16): images to draw the predictions into, the first ones
        picture_score (float, default 0.5): detections with a lower score are not drawn
        format (Literal['csv', 'jsonl', 'parquet'], default 'csv'): table of a classifier's classes
        top_k (int, default 1): most probable classes of an image that a classifier writes
        batch_size (int, default 8): images per forward pass (of a classifier 256 if not given)
        overwrite (bool, default False): replace the contents of the output folder
    """

def pretrain(
    data: Data,
    *,
    out: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    cache_on_gpu: bool = True,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    resume: bool = False,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batch_size: Literal["auto"] | int | None = "auto",
    base_lr: float | None = None,
    weight_decay: float = 0.05,
    beta2: float = 0.95,
    clip_grad: float | None = None,
    warmup: float = 0.05,
    min_lr: float = 0.0,
    crop_scale: float = 0.2,
    hflip: bool = True,
    grad_checkpointing: bool = False,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log_every: int = 20,
    workers: int | None = None,
    save_every: int = 500,
    logger: Sequence[Literal["tensorboard", "wandb", "mlflow"]] = (),
    tensorboard: bool = False,
    monitor: Sequence[str] = (),
    monitor_every: int | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    init: str | Path | None = None,
    mean: float | Sequence[float] = (0.485, 0.456, 0.406),
    std: float | Sequence[float] = (0.229, 0.224, 0.225),
    mask_ratio: float = 0.75,
    norm_pix: bool = True,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
) -> PretrainResult:
    """Pre-train a masked autoencoder on unlabeled images (stage 0).

    Args:
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        out (str | Path): folder to write the run to
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        cache_on_gpu (bool, default True): keep the data (pixels, or features when clustering) on
            the GPU if they take at most a quarter of its free memory
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        resume (bool, default False): resume from the last checkpoint in the output folder
        epochs (float | None, default None): passes over the images, fractions allowed (default:
            from the number of images)
        steps (int | None, default None): optimizer steps (default: from epochs)
        batch_size (int | None, default None): images per optimizer step, over all processes and
            micro-batches (default: 256, fewer for few images)
        micro_batch_size (Literal['auto'] | int | None, default 'auto'): images per forward pass of
            each process; gradients are accumulated over a batch. auto: as many as a GPU's memory
            holds, found by trying and recorded; 256 on a CPU and with fsdp
        base_lr (float | None, default None): learning rate per 256 images; the rate is base_lr *
            batch_size / 256 (default: from the size of the model and the weights it starts from)
        weight_decay (float, default 0.05): AdamW weight decay (none on biases, norms)
        beta2 (float, default 0.95): AdamW second-moment decay
        clip_grad (float | None, default None): clip the gradient to this norm
        warmup (float, default 0.05): share of the steps with a rising learning rate
        min_lr (float, default 0.0): learning rate at the end of the cosine
        crop_scale (float, default 0.2): smallest random crop, as a share of the image's area
        hflip (bool, default True): flip half of the images horizontally
        grad_checkpointing (bool, default False): save memory: recompute the activations of each
            block in the backward pass
        strategy (Literal['auto', 'ddp', 'fsdp'], default 'auto'): with several processes, each
            holds the whole network (ddp) or a share of it (fsdp); auto: ddp
        log_every (int, default 20): steps between lines of metrics.jsonl and timings.jsonl
        workers (int | None, default None): processes that read and crop images ahead of their use
            (default: one per core, divided among the training processes of a machine; 0: none
            beside the training process)
        save_every (int, default 500): steps between checkpoints
        logger (Sequence[Literal['tensorboard', 'wandb', 'mlflow']], default ()): also log to
            tensorboard, wandb (WANDB_MODE=offline: to files) or mlflow (MLFLOW_TRACKING_URI, or
            mlflow.db beside the run); several with commas
        tensorboard (bool, default False): the same as --logger tensorboard
        monitor (Sequence[str], default ()): tasks (DATA arguments with labels, e.g. birds/,cars/)
            to score the frozen encoder on while it trains, by k-NN and by a linear probe; test
            images are scored as by moce probe
        monitor_every (int | None, default None): steps between measurements: of the tasks of
            --monitor, of the rank of the features (RankMe) and of pictures of reconstructions
            (default: ten in a run; without --monitor fewer or none, to cost 1 % of the time at
            most)
        model (str | None, default None): encoder: any plain timm ViT (default: one that fits the
            images and the device)
        model_args (dict[str, Any], default {}): timm model arguments, e.g. {"embed_dim": 128,
            "depth": 6}
        img_size (int | None, default None): image side in pixels (default: the model's)
        init (str | Path | None, default None): start from a moce MAE run; weights of another
            library: a file, a folder or a timm name; or 'pretrained', the timm model's own weights
        mean (float | Sequence[float], default (0.485, 0.456, 0.406)): mean of the channels, 0..1,
            to normalize pixels by: one value or one per channel (default for other than 3: 0.5)
        std (float | Sequence[float], default (0.229, 0.224, 0.225)): standard deviation of the
            channels, to normalize pixels by (default for other than 3 channels: 0.5)
        mask_ratio (float, default 0.75): share of patches masked
        norm_pix (bool, default True): predict pixels normalized per patch
        decoder_dim (int, default 512): decoder width
        decoder_depth (int, default 8): decoder blocks
        decoder_heads (int, default 16): decoder attention heads
    """

def probe(
    backbone: str | Path,
    data: Data,
    *,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    kind: Literal["linear", "knn"] = "linear",
    solver: Literal["sgd", "lbfgs"] = "sgd",
    metric: Literal["accuracy", "mean_per_class", "map11"] | None = None,
    num_labels: int | None = None,
    draws: int = 1,
    pooling: Literal["mean", "cls"] | None = None,
    neighbors: int = 20,
    epochs: float = 90,
    batch_size: int = 16384,
    micro_batch_size: int = 256,
    base_lr: float = 0.1,
    warmup: float = 0.1111,
    crop_scale: float = 0.08,
    hflip: bool = True,
    workers: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> ProbeResult:
    """Score frozen features on a labeled task with a linear or nearest-neighbor classifier.

    Args:
        backbone (str | Path): backbone: a customized folder, a run of moce pretrain or finetune,
            weights of another library (a file or a folder) or a timm name
        data (Data): labeled images: class folders (train/ and test/ if split), or another source
            with labels
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        kind (Literal['linear', 'knn'], default 'linear'): classifier
        solver (Literal['sgd', 'lbfgs'], default 'sgd'): kind linear by sgd: MAE's recipe, LARS on
            augmented images; or by lbfgs: logistic regression on features computed once, its
            strength cross-validated
        metric (Literal['accuracy', 'mean_per_class', 'map11'] | None, default None): accuracy,
            mean_per_class or map11 (default: map11 where an image can have several labels, else
            accuracy)
        num_labels (int | None, default None): labeled images per draw (default: all)
        draws (int, default 1): random draws of the labels
        pooling (Literal['mean', 'cls'] | None, default None): feature: mean of patch tokens, or
            cls, the class token (default: cls for solver sgd if the encoder has one, else mean)
        neighbors (int, default 20): neighbors k (kind knn)
        epochs (float, default 90): passes over the images (solver sgd)
        batch_size (int, default 16384): images per optimizer step, at most all there are (solver
            sgd)
        micro_batch_size (int, default 256): images per forward pass
        base_lr (float, default 0.1): learning rate per 256 images; the rate is base_lr * images per
            step / 256 (solver sgd)
        warmup (float, default 0.1111): share of the steps with a rising learning rate (solver sgd)
        crop_scale (float, default 0.08): smallest random crop, as a share of the image's area
            (solver sgd)
        hflip (bool, default True): flip half of the images horizontally (solver sgd)
        workers (int | None, default None): processes that read and crop images ahead of their use
            (default: one per core, divided among the training processes of a machine; 0: none
            beside the training process) (solver sgd)
        out (str | Path | None, default None): folder to write results.json to
        overwrite (bool, default False): replace the contents of the output folder
    """

def push(
    folder: str | Path, repo: str, *, private: bool = False, license: str | None = None
) -> PushResult:
    """Push an exported folder, with its card, to the Hugging Face hub.

    Args:
        folder (str | Path): folder of moce customize or moce export
        repo (str): name on the hub: ORGANIZATION/NAME
        private (bool, default False): only for the organization's members
        license (str | None, default None): license of the weights, for the card, e.g. cc-by-nc-4.0
    """

def report(
    *runs: str | Path, out: str | Path = "report.html", max_images: int = 12
) -> ReportResult:
    """Draw run folders as one self-contained HTML page.

    Args:
        runs (str | Path): run folders, or a folder of run folders
        out (str | Path, default 'report.html'): file to write
        max_images (int, default 12): pictures per row of a montage
    """

def run(
    data: Data,
    *,
    out: str | Path,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    tasks: Sequence[str] = (),
    resume: bool = False,
    mae: str | Path | None = None,
    model: str | None = None,
    init: str | Path | None = None,
    epochs: float | None = None,
    pretrain: dict[str, Any] = {},
    cluster: dict[str, Any] = {},
    train: dict[str, Any] = {},
    customize: dict[str, Any] = {},
    probe: dict[str, Any] = {},
) -> RunResult:
    """Pretrain, cluster, train experts, then customize and probe for each task: all in one.

    Args:
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        out (str | Path): folder to write the run to
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        tasks (Sequence[str], default ()): the tasks' images, each as a DATA argument, e.g.
            birds/,cars/
        resume (bool, default False): finish an interrupted run, or add tasks to a finished one
        mae (str | Path | None, default None): start from this run of moce pretrain, or weights of
            another library, without pretraining
        model (str | None, default None): encoder to pretrain, as of moce pretrain
        init (str | Path | None, default None): weights to start pretraining from, as of moce
            pretrain
        epochs (float | None, default None): epochs of pretraining, as of moce pretrain
        pretrain (dict[str, Any], default {}): further settings of moce pretrain, as YAML
        cluster (dict[str, Any], default {}): settings of moce cluster, e.g. {num_clusters: 64}
        train (dict[str, Any], default {}): settings of moce train, e.g. {num_experts: 4, epochs:
            50}
        customize (dict[str, Any], default {}): settings of moce customize, e.g. {strategy: route}
        probe (dict[str, Any], default {}): settings of moce probe, e.g. {num_labels: 200}
    """

def train(
    data: Data,
    *,
    mae: str | Path,
    out: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    weights_key: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] = {},
    img_size: int | None = None,
    decoder_heads: int | None = None,
    cache_on_gpu: bool = True,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "float32", "bf16"] = "auto",
    threads: int | None = None,
    max_skipped: float = 0.5,
    overwrite: bool = False,
    resume: bool = False,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batch_size: Literal["auto"] | int | None = "auto",
    base_lr: float | None = None,
    weight_decay: float = 0.05,
    beta2: float = 0.95,
    clip_grad: float | None = None,
    warmup: float = 0.05,
    min_lr: float = 0.0,
    crop_scale: float = 0.2,
    hflip: bool = True,
    grad_checkpointing: bool = False,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log_every: int = 20,
    workers: int | None = None,
    save_every: int = 500,
    logger: Sequence[Literal["tensorboard", "wandb", "mlflow"]] = (),
    tensorboard: bool = False,
    monitor: Sequence[str] = (),
    monitor_every: int | None = None,
    clusters: str | Path | None = None,
    method: Literal["moce", "mae", "token_moe", "sdr", "subset"] = "moce",
    task: Data | None = None,
    task_share: float = 0.9,
    num_experts: int = 8,
    moe_blocks: Sequence[int] | None = None,
    expert_scope: Literal["ffn", "block"] = "ffn",
    gate_scale: Literal["straight_through", "prob"] = "straight_through",
    gate_init: Literal["centroids", "random"] = "centroids",
    gate_confidence: float = 0.8,
    gate_init_std: float = 0.02,
    gate_lr_scale: float = 1.0,
    gate_noise: bool = True,
    shared_gate: bool = False,
    balance_weight: float = 0.01,
    imbalance_weight: float = 0.01,
    balance_bound: float = 2.0,
    balance_scope: Literal["dataset", "batch"] = "dataset",
) -> TrainResult:
    """Train cluster-conditional experts from an MAE (stage 2), or a baseline for as long.

    Args:
        data (Data): images: a folder, image files, .parquet, .npy, .npz, shards-{000..012}.tar, a
            saved Hugging Face data set, hf:NAME, torchvision:NAME, a packed folder, a URL or
            demo:pretrain; separate several by commas, or list them in @FILE, one per line
        mae (str | Path): run of moce pretrain, or weights of another library: a file, a folder, a
            timm name
        out (str | Path): folder to write the run to
        allow_missing (Sequence[str], default ()): glob patterns of weights that may be missing,
            e.g. norm.*; they are initialized
        allow_unexpected (Sequence[str], default ()): glob patterns of unexpected weights to ignore
        weights_key (str | None, default None): which network of a file that holds several, such as
            state_dict_ema or teacher
        model (str | None, default None): timm architecture of a weights file (default: inferred
            from tensor shapes)
        model_args (dict[str, Any], default {}): timm model arguments for a weights file, e.g.
            {"num_heads": 2}
        img_size (int | None, default None): image side in pixels for a weights file (default: its
            own)
        decoder_heads (int | None, default None): attention heads of the decoder in a weights file
            (default: 16)
        cache_on_gpu (bool, default True): keep the data (pixels, or features when clustering) on
            the GPU if they take at most a quarter of its free memory
        seed (int, default 0): seed of all random numbers
        device (Literal['auto', 'cpu', 'cuda', 'mps'], default 'auto'): device to compute on
        precision (Literal['auto', 'float32', 'bf16'], default 'auto'): dtype of the networks'
            arithmetic; auto picks bf16 where it is faster
        threads (int | None, default None): CPU threads (default: OMP_NUM_THREADS, or all cores)
        max_skipped (float, default 0.5): stop if a larger share of the images cannot be read
        overwrite (bool, default False): replace the contents of the output folder
        resume (bool, default False): resume from the last checkpoint in the output folder
        epochs (float | None, default None): passes over the images, fractions allowed (default:
            from the number of images)
        steps (int | None, default None): optimizer steps (default: from epochs)
        batch_size (int | None, default None): images per optimizer step, over all processes and
            micro-batches (default: 256, fewer for few images)
        micro_batch_size (Literal['auto'] | int | None, default 'auto'): images per forward pass of
            each process; gradients are accumulated over a batch. auto: as many as a GPU's memory
            holds, found by trying and recorded; 256 on a CPU and with fsdp
        base_lr (float | None, default None): learning rate per 256 images; the rate is base_lr *
            batch_size / 256 (default: from the size of the model and the weights it starts from)
        weight_decay (float, default 0.05): AdamW weight decay (none on biases, norms)
        beta2 (float, default 0.95): AdamW second-moment decay
        clip_grad (float | None, default None): clip the gradient to this norm
        warmup (float, default 0.05): share of the steps with a rising learning rate
        min_lr (float, default 0.0): learning rate at the end of the cosine
        crop_scale (float, default 0.2): smallest random crop, as a share of the image's area
        hflip (bool, default True): flip half of the images horizontally
        grad_checkpointing (bool, default False): save memory: recompute the activations of each
            block in the backward pass
        strategy (Literal['auto', 'ddp', 'fsdp'], default 'auto'): with several processes, each
            holds the whole network (ddp) or a share of it (fsdp); auto: ddp
        log_every (int, default 20): steps between lines of metrics.jsonl and timings.jsonl
        workers (int | None, default None): processes that read and crop images ahead of their use
            (default: one per core, divided among the training processes of a machine; 0: none
            beside the training process)
        save_every (int, default 500): steps between checkpoints
        logger (Sequence[Literal['tensorboard', 'wandb', 'mlflow']], default ()): also log to
            tensorboard, wandb (WANDB_MODE=offline: to files) or mlflow (MLFLOW_TRACKING_URI, or
            mlflow.db beside the run); several with commas
        tensorboard (bool, default False): the same as --logger tensorboard
        monitor (Sequence[str], default ()): tasks (DATA arguments with labels, e.g. birds/,cars/)
            to score the frozen encoder on while it trains, by k-NN and by a linear probe; test
            images are scored as by moce probe
        monitor_every (int | None, default None): steps between measurements: of the tasks of
            --monitor, of the rank of the features (RankMe) and of pictures of reconstructions
            (default: ten in a run; without --monitor fewer or none, to cost 1 % of the time at
            most)
        clusters (str | Path | None, default None): run folder of moce cluster (not for methods mae
            and token_moe)
        method (Literal['moce', 'mae', 'token_moe', 'sdr', 'subset'], default 'moce'): moce:
            experts; baselines for the same steps: mae (MAE+, no experts), token_moe (the gate reads
            tokens), sdr (the experts of clusters are fixed beforehand), subset (mae on the images
            of one task's clusters only)
        task (Data | None, default None): the task's images (for method subset)
        task_share (float, default 0.9): share of the task's images whose clusters method subset
            trains on
        num_experts (int, default 8): experts E per MoE block
        moe_blocks (Sequence[int] | None, default None): encoder blocks with experts, e.g. 9,11
            (default: the last two odd ones)
        expert_scope (Literal['ffn', 'block'], default 'ffn'): what an expert is: the block's FFN
            (as in the paper), or the whole block
        gate_scale (Literal['straight_through', 'prob'], default 'straight_through'): scale of an
            expert's output: straight_through (value 1) or prob (as in the paper)
        gate_init (Literal['centroids', 'random'], default 'centroids'): initialize gates from
            groups of centroids, or at random
        gate_confidence (float, default 0.8): mean largest gate probability at the start (gate_init
            centroids)
        gate_init_std (float, default 0.02): standard deviation of initial gate weights (gate_init
            random)
        gate_lr_scale (float, default 1.0): learning rate of the gates over that of the other
            weights
        gate_noise (bool, default True): add noise N(0, 1/E^2) to gate logits in training
        shared_gate (bool, default False): one gate, so one route, for all MoE blocks
        balance_weight (float, default 0.01): weight of the balance loss
        imbalance_weight (float, default 0.01): weight of the imbalance loss
        balance_bound (float, default 2.0): most images of an expert in even shares, at the start
            and before the balance loss sets in; 1: equal shares (as in the paper)
        balance_scope (Literal['dataset', 'batch'], default 'dataset'): count the images of each
            expert over the data set's clusters or over the batch
    """
