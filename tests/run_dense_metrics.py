"""Started by torchrun in tests: every process adds its share of the images; rank 0 writes the figures.

python run_dense_metrics.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from test_dense_metrics import many_images, many_masks

from moce.dense.metrics import DetectionMetric, SegmentationMetric
from moce.runtime.distributed import rank, shard_range

dist.init_process_group("gloo")
detection, segmentation = (
    DetectionMetric(["a", "b", "c"], True),
    SegmentationMetric(["x", "y", "z"]),
)
images, masks = many_images(), many_masks()
for image in images[shard_range(len(images))]:
    detection.add(*image)
for prediction, truth in masks[shard_range(len(masks))]:
    segmentation.add(prediction, truth)
figures = {**detection.compute(), **segmentation.compute()}
if rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(figures))
dist.destroy_process_group()
