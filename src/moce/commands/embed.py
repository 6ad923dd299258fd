"""moce embed: one feature per image, in a parquet file, for search, clustering or any classifier."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from torch import Tensor

from moce.commands.setup import check_file, prepare, read_images
from moce.config import EmbedSettings
from moce.data.dataset import ImageDataset
from moce.data.readers.factory import paths_of
from moce.data.readers.splits import scored_split
from moce.errors import counted
from moce.inference.features import feature_width, shared_feature_batches
from moce.runs.files import atomic, make_folder
from moce.runtime.distributed import barrier
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log
from moce.weights.from_runs import load_backbone


@dataclass
class EmbedResult:
    """file: with a row per image. width: numbers per feature. skipped: (id, reason)."""

    file: Path
    images: int
    width: int
    skipped: list[tuple[str, str]]

    def summary(self) -> str:
        skipped = (
            f", {counted(len(self.skipped), 'unreadable one')} skipped" if self.skipped else ""
        )
        return f"{counted(self.images, 'image')}{skipped}, {self.width} numbers each: {self.file}"


def run(settings: EmbedSettings) -> EmbedResult:
    inputs = paths_of(settings.data)
    check_file(settings.out, inputs, "features.parquet", overwrite=settings.overwrite)
    device, precision = prepare(settings)
    backbone = load_backbone(settings.backbone)
    vit = backbone.vit
    images = read_images(settings, settings.data, vit, choose=None)
    scored = scored_split(images.splits)
    if scored is not None:
        count = images.splits.count(scored)
        log(f"embedding all {len(images)} images, {count} of them {scored} images (column split)")
    for name, reason in images.skipped:
        log(f"skipped {name}: {reason}")
    batches = shared_feature_batches(
        vit,
        backbone.spec,
        images,
        device=device,
        precision=precision,
        pooling=settings.pooling,
        batch_size=settings.batch_size,
    )
    width = feature_width(vit, settings.pooling)
    if is_rank0():
        make_folder(settings.out.parent)
        _write(settings.out, images, batches, width)
    else:
        deque(batches, maxlen=0)  # takes part in making them
    barrier()
    return EmbedResult(settings.out, len(images), width, images.skipped)


def _write(out: Path, images: ImageDataset, batches: Iterator[Tensor], width: int) -> None:
    """One row group per batch, so that only one batch is in memory."""
    multi_label = any(isinstance(label, tuple) for label in images.labels)
    text = pyarrow.string()
    schema = pyarrow.schema(
        {
            "id": text,
            "label": pyarrow.list_(text) if multi_label else text,
            "split": text,
            "embedding": pyarrow.list_(pyarrow.float32(), width),
        }
    )
    done = 0
    with atomic(out) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for batch in batches:
            rows = slice(done, done + len(batch))
            done = rows.stop
            numbers = pyarrow.array(batch.numpy().reshape(-1))
            columns = [
                images.ids[rows],
                images.labels[rows],
                images.splits[rows],
                pyarrow.FixedSizeListArray.from_arrays(numbers, width),
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))
