"""Random numbers. Each is a function of (seed, purpose, index), independent of all numbers generated before.

Streams come from Philox, a counter-based generator: seed and purpose are its key, the index is the high half of its
counter. Streams of one key never overlap, and two purposes never share a key. The order of calls, batch size, number of
processes and resume point therefore have no effect.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt


class Purpose(IntEnum):
    """Use of random numbers. The value is part of the key of every stream: never reuse or renumber one."""

    LABELS = 1
    """Classes of the samples."""
    TOKENS = 2
    """Uniform numbers for a sample's tokens; index: sample number."""
    EPOCHS = 3
    """Order of the training images; index: epoch."""
    VIEWS = 4
    """View of a training image; index: epoch * number of images + image."""
    CROPS = 5
    """Crop of a training image of the tokenizer; index: epoch, part: image."""
    WEIGHTS = 6
    """Initial weights of a model and its auxiliary modules; a torch seed."""
    TRAINING_STEP = 7
    """Dropout and all other randomness of a forward pass; index: step, part: place of the pass's first image in the
    global batch; a torch seed."""
    MARGINALS = 8
    """Tokens from the marginal of each position."""
    RANDOM_TOKENS = 9
    """Tokens from the uniform distribution."""
    INCEPTION_SCORE = 10
    """Order of the samples before they are split into parts."""
    SCATTER = 11
    """Jitter of overlapping points in a figure."""


def stream(seed: int, purpose: Purpose, index: int = 0, part: int = 0) -> np.random.Generator:
    """A separate generator for each seed (below 2**63), purpose, index and part (each below 2**64).

    Raises:
        OverflowError: A number is negative or too large.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, part, index], dtype=np.uint64)  # the low half counts the blocks of one stream
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def choices(seed: int, purpose: Purpose, indices: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """A number in [0, count) for each index. Fast for many indices.

    The method is a keyed permutation of 64-bit words: splitmix64's finaliser, applied twice, each time after XOR with a
    word of the key. Different indices give different words. The bias of the modulo is below count / 2**64.

    Source: Steele et al., Fast splittable pseudorandom number generators (OOPSLA 2014), for the finaliser.
    """
    first, second = _key_words(seed, purpose)
    words = _finalised(_finalised(indices.astype(np.uint64) ^ first) ^ second)
    return (words % np.uint64(count)).astype(np.int64)


def torch_seed(seed: int, purpose: Purpose, index: int = 0, part: int = 0) -> int:
    """A seed for torch's generators, in [0, 2**63). torch's CPU generator only uses its low 32 bits."""
    return int(stream(seed, purpose, index, part).integers(2**63))


def seed_torch(seed: int, purpose: Purpose, index: int = 0, part: int = 0) -> None:
    """Seed torch's default generators on the CPU and on every GPU."""
    import torch  # stages without a model need no torch, and the import takes seconds

    torch.manual_seed(torch_seed(seed, purpose, index, part))


@lru_cache(maxsize=16)
def _key_words(seed: int, purpose: Purpose) -> tuple[np.uint64, np.uint64]:
    first, second = stream(seed, purpose).integers(2**64, size=2, dtype=np.uint64)
    return first, second


def _finalised(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of 64-bit words in which every output bit depends on every input bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))
