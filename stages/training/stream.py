"""Which sample is trained on when: a pure function of (seed, step), whatever the number of processes.

Global step s takes samples s*G .. (s+1)*G of an endless stream of epochs, each a permutation of the training images.
Nothing is padded or repeated at the epoch's edge, and the step number is all of the loader's state that ever changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stages.runtime.distributed import World
from stages.runtime.errors import InputError
from stages.runtime.randomness import Purpose, choices, stream

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleStream:
    """The endless stream of (image, epoch) pairs of a training run."""

    num_images: int
    global_batch_size: int
    seed: int

    def state(self, steps: int) -> dict[str, int | str]:
        """Where the stream stands after so many steps; the number of processes is no part of it."""
        return {"seed": self.seed, "num_images": self.num_images, "samples_seen": steps * self.global_batch_size}

    def rank_slice(self, step: int, world: World) -> tuple[Integers, Integers]:
        """Images that this process trains on in `step`, and the epoch of each.

        Raises:
            InputError: The global batch cannot be shared equally.
        """
        if self.global_batch_size % world.size:
            raise InputError(
                f"training.global_batch_size is {self.global_batch_size}, expected a multiple of the "
                f"{world.size} processes: change it or runtime.processes"
            )
        share = self.global_batch_size // world.size
        first = step * self.global_batch_size + world.rank * share
        places = np.arange(first, first + share, dtype=np.int64)
        epochs = places // self.num_images
        images = np.empty(share, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            images[chosen] = _epoch_order(self.num_images, self.seed, int(epoch))[places[chosen] % self.num_images]
        return images, epochs

    def views(self, images: Integers, epochs: Integers, num_views: int) -> Integers:
        """A random view of each image in its epoch."""
        return choices(self.seed, Purpose.VIEWS, epochs * self.num_images + images, num_views)


@lru_cache(maxsize=2)  # at the edge of an epoch a batch takes from two
def _epoch_order(num_images: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    order = np.arange(num_images, dtype=np.uint32)
    stream(seed, Purpose.EPOCHS, epoch).shuffle(order)
    return order
