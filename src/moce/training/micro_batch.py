"""Micro-batches that find themselves: as many images a pass as a GPU's memory holds, by trying.

Accelerate's find_executable_batch_size and timm's decay_batch_step lower a size until a whole run
goes through. Here a trial is one pass, all processes agree on it, and passes are equally long.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from moce.config import TrainingSettings
from moce.data.loader import shard_micro_batches
from moce.errors import MoceError, counted, is_out_of_memory
from moce.models.activation_checkpoint import set_checkpointing
from moce.models.encoder import choose_attention
from moce.models.token_moe import TokenExpertFFN
from moce.runtime.distributed import all_reduce, world_size
from moce.runtime.progress import log
from moce.training.trainer import Objective
from moce.training.trial import trial

S = TypeVar("S", bound=TrainingSettings)

TRIED_ON = {"cuda"}  # a CPU's memory has no limit that could be tried: the system ends the process
UNTRIED = 256  # images
PASSES = 2  # memory is in pieces after the first


def settle_micro_batch(objective: Objective, settings: S, device: torch.device) -> S:
    """The settings with a number in place of micro_batch_size "auto"; training records it.

    Tried on GPUs, but not where processes would wait for each other in a pass. Raises MoceError if
    not even one image fits.
    """
    if settings.micro_batch_size != "auto":
        return settings
    shared = any(isinstance(module, TokenExpertFFN) for module in objective.model.modules())
    together = settings.strategy == "fsdp" or shared
    if device.type not in TRIED_ON or (together and world_size() > 1):
        return settings.model_copy(update={"micro_batch_size": UNTRIED})
    share = -(-settings.batch_size // world_size())
    size = most_that_fit(share, lambda count: fits(objective, settings, device, count))
    if size is None:
        raise MoceError(
            "out of memory with one image a pass: give --grad-checkpointing, or a smaller model"
        )
    while not _all_have_images(settings.batch_size, size):
        size -= 1
    passes = counted(-(-share // size), "pass", "passes")
    log(f"--micro-batch-size {size}: {passes} for each batch, the fewest that fit into memory")
    return settings.model_copy(update={"micro_batch_size": size})


def most_that_fit(count: int, fits: Callable[[int], bool]) -> int | None:
    """Images a pass of the fewest equal passes over `count` images that fit; None if one does not."""
    size_of = lambda passes: -(-count // passes)  # noqa: E731
    failed, passes = 0, 1
    while not fits(size_of(passes)):
        if size_of(passes) == 1:
            return None
        failed, passes = passes, min(2 * passes, count)
    while passes - failed > 1:
        middle = (failed + passes) // 2
        if fits(size_of(middle)):
            passes = middle
        else:
            failed = middle
    return size_of(passes)


def fits(
    objective: Objective, settings: TrainingSettings, device: torch.device, count: int
) -> bool:
    """Whether all processes have room for a pass over `count` images and for what comes later."""
    choose_attention(objective.model, device, settings.precision)
    set_checkpointing(objective.model, settings.grad_checkpointing)
    objective.model.train()
    failed = False
    try:
        with trial(objective, settings, device, count) as one_pass:
            reserved = torch.empty(_numbers_to_come(objective), device=device)
            for _ in range(PASSES):
                one_pass()
            del reserved
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return not int(all_reduce(torch.tensor(int(failed))))


def _numbers_to_come(objective: Objective) -> int:
    """float32 numbers that training keeps beside weights and gradients.

    AdamW's two averages, buckets of gradients with several processes, an average of the weights.
    """
    parameters = list(objective.model.parameters())
    trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
    averaged = sum(weight.numel() for weight in parameters) if objective.ema else 0
    return trained * (2 + (world_size() > 1)) + averaged


def _all_have_images(batch_size: int, size: int) -> bool:
    """Whether every process has an image in every pass; with size 1 the trainer says what is wrong."""
    own = shard_micro_batches(batch_size, size)
    empty = torch.tensor(int(any(part.stop == part.start for part in own)))
    return size == 1 or not int(all_reduce(empty))
