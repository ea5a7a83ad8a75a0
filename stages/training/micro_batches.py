"""The number of images that a process forwards at once: from the settings, or the most that the GPU's memory holds.

A step's loss is a mean over images, so it is the mean of its micro-batches' losses, weighted by their images. Losses
and gradients of a divided step equal those of the undivided one up to rounding. There are two exceptions. Dropout has
other noise: a micro-batch is seeded by (seed, step, place of its first image), which makes a resumed run exact and
independent of the number of processes, but not of the size of a micro-batch. And BatchNorm, which only the tokenizer's
discriminator has, takes its statistics over a micro-batch: a process with four micro-batches equals four processes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.runtime.distributed import World, start_max
from stages.runtime.errors import InputError
from stages.training.stream import Part

logger = logging.getLogger(__name__)
_SPARE = 0.05  # share of a GPU's memory left free: the number of patches differs between batches


def check_micro_batch(wanted: int | None, share: Part) -> None:
    """Check the setting before anything is loaded.

    Raises:
        InputError: The micro-batch is larger than the process's share of a step.
    """
    if wanted is not None and wanted > share.count:
        raise InputError(
            f"runtime.micro_batch is {wanted}, expected at most {share.count}, the images that a process takes of "
            "training.global_batch_size: lower it, or use fewer processes"
        )


def micro_batch(
    wanted: int | None, before: int | None, share: Part, attempt: Callable[[int], object], world: World
) -> int:
    """Images that a process forwards at once.

    Args:
        wanted: The setting; None to find it.
        before: Micro-batch of the checkpoint that training resumes from. The search starts there, so that a resumed run
            has the same dropout.
        share: The process's share of a step.
        attempt: Forward and backward pass of a number of images that leaves nothing behind.
        world: All processes take the smallest number that one of them finds.

    Raises:
        InputError: Not even one image fits.
    """
    if wanted is not None:
        return wanted
    if world.device.type != "cuda":
        return share.count
    found = -start_max([-largest_fitting(min(share.count, before or share.count), attempt)])()[0]
    logger.info("micro-batch: %d of the %d images of a process, found by trying", found, share.count)
    return found


def largest_fitting(count: int, attempt: Callable[[int], object]) -> int:
    """The first of `count`, half of it, a quarter … for which `attempt` does not run out of memory.

    Raises:
        InputError: Not even one image fits.
    """
    while not _fits(count, attempt):
        if count == 1:
            raise InputError(
                "a training step of one image needs more memory than the GPU has free: set "
                "runtime.checkpoint_activations=true, or train a smaller model"
            )
        count = -(-count // 2)
    return count


def _fits(count: int, attempt: Callable[[int], object]) -> bool:
    try:
        attempt(count)
    except torch.OutOfMemoryError:
        fits = False  # the exception holds the frames of the attempt, and with them its tensors, until it is handled
    else:
        fits = True
    gc.collect()
    torch.cuda.empty_cache()
    return fits


@contextmanager
def unchanged(objective: nn.Module) -> Iterator[None]:
    """Context that gives the module its buffers back at the end, and takes away its gradients."""
    kept = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in objective.named_buffers():
            buffer.copy_(kept[name])
        objective.zero_grad(set_to_none=True)


def ballast(device: torch.device, unmade: int) -> list[Tensor]:
    """Memory that a step needs beside its pass: `unmade` bytes of the optimiser's state, and some to spare."""
    if device.type != "cuda":
        return []
    spare = int(_SPARE * torch.cuda.get_device_properties(device).total_memory)
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in (unmade, spare)]


def try_pass(objective: nn.Module, batch: Any, device: torch.device, unmade: int) -> None:
    """Forward and backward pass of a batch in the memory of a training step; the module is left as it was."""
    with unchanged(objective):
        held = ballast(device, unmade)
        loss, _ = objective(batch)
        loss.backward()
        del held
