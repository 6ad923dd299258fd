"""What to do where training runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moce.config import TrainingSettings
from moce.errors import OutOfMemory, counted, is_out_of_memory
from moce.runtime.distributed import world_size


@contextmanager
def advise_on_memory(settings: TrainingSettings, device: torch.device) -> Iterator[None]:
    """Raise OutOfMemory, which names the settings that take less, where there is none left."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(less_memory(settings, device)) from None


def less_memory(settings: TrainingSettings, device: torch.device) -> str:
    """What to give after running out of memory, in one line."""
    share = -(-settings.batch_size // world_size())
    used = min(settings.images_per_pass or share, share)
    fewer = f"--micro-batch-size {used // 2} (--overwrite starts over)" if used > 1 else ""
    other = "" if settings.grad_checkpointing else "--grad-checkpointing"
    cache = "--no-cache-on-gpu" if settings.cache_on_gpu and device.type == "cuda" else ""
    ways = ", or ".join(filter(None, (fewer, other, cache))) or "a smaller model"
    return f"out of memory with {counted(used, 'image')} a pass: give {ways}"
