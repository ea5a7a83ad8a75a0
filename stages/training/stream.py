"""The order of training samples: a pure function of (seed, step), independent of the number of processes.

Global step s takes samples s * G to (s + 1) * G - 1 of an endless stream of epochs, with G the global batch size. Each
epoch is a permutation of the training images. No sample is padded or repeated at the end of an epoch. The step number
is the only state of the loader that changes.

A process takes its share of the global batch in parts, its micro-batches. Places of a part count in the global batch,
so a part is the same whichever process takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt32
from numpy.typing import NDArray

from stages.runtime.distributed import World
from stages.runtime.errors import InputError
from stages.runtime.randomness import Purpose, choices, stream

Numbers = Int64[NDArray[np.int64], " n"]
"""Image or epoch of each sample."""


@dataclass(frozen=True)
class Part:
    """Consecutive places of the global batch that one process forwards at once: a micro-batch."""

    first: int
    count: int


def share_of(global_batch_size: int, world: World) -> Part:
    """The places of the global batch that this process trains on.

    Raises:
        InputError: The global batch is not a multiple of the number of processes.
    """
    if global_batch_size % world.size:
        raise InputError(
            f"training.global_batch_size is {global_batch_size}, expected a multiple of the {world.size} processes: "
            "change it or runtime.processes"
        )
    count = global_batch_size // world.size
    return Part(world.rank * count, count)


def divided(share: Part, micro_batch: int) -> list[Part]:
    """The share in micro-batches. The last one is smaller if `micro_batch` does not divide the share."""
    end = share.first + share.count
    return [Part(first, min(micro_batch, end - first)) for first in range(share.first, end, micro_batch)]


@dataclass(frozen=True)
class SampleStream:
    """The endless stream of (image, epoch) pairs of a training run."""

    num_images: int
    global_batch_size: int
    seed: int

    def state(self, steps: int) -> dict[str, int | str]:
        """State of the stream after a number of steps. It does not depend on the number of processes."""
        return {"seed": self.seed, "num_images": self.num_images, "samples_seen": steps * self.global_batch_size}

    def samples(self, step: int, part: Part) -> tuple[Numbers, Numbers]:
        """Images at these places of the global batch of `step`, and the epoch of each."""
        first = step * self.global_batch_size + part.first
        places = np.arange(first, first + part.count, dtype=np.int64)
        epochs = places // self.num_images
        images = np.empty(part.count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            images[chosen] = _epoch_order(self.num_images, self.seed, int(epoch))[places[chosen] % self.num_images]
        return images, epochs

    def views(self, images: Numbers, epochs: Numbers, num_views: int) -> Numbers:
        """A random view of each image, a function of its epoch."""
        return choices(self.seed, Purpose.VIEWS, epochs * self.num_images + images, num_views)


@lru_cache(maxsize=2)  # a batch at the end of an epoch needs two
def _epoch_order(num_images: int, seed: int, epoch: int) -> UInt32[NDArray[np.uint32], " {num_images}"]:
    order = np.arange(num_images, dtype=np.uint32)
    stream(seed, Purpose.EPOCHS, epoch).shuffle(order)
    return order
