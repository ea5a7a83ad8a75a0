"""Per-position unigram model of tokens: its held-out loss, which is a baseline for models, and samples from it.

Tokens come in blocks (n, T), so that the store may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer
from numpy.typing import NDArray

from stages.runtime.randomness import Purpose, stream

Block = Integer[NDArray[np.integer[Any]], "_ T"]
"""Tokens of some images. Blocks may have different numbers of images."""
_SMOOTHINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)


def best_unigram_loss(
    train: Iterable[Block], heldout: Iterable[Block], codebook_size: int, first_position: int = 0
) -> float:
    """Mean held-out loss per token, in nats, of the best per-position unigram model of the training tokens.

    The additive smoothing is chosen on the held-out tokens themselves, which makes this a lower bound over smoothings.
    Positions before `first_position` are left out.
    """
    seen, num_train = _counts(train, codebook_size)
    totals, count = np.zeros(len(_SMOOTHINGS)), 0
    for block in heldout:
        tokens = block[:, first_position:]
        often = seen[np.arange(first_position, block.shape[1]), tokens]  # (n, T)
        for place, smoothing in enumerate(_SMOOTHINGS):
            totals[place] -= np.log((often + smoothing) / (num_train + smoothing * codebook_size)).sum()
        count += tokens.size
    return float(totals.min() / count)


def sample_marginals(
    train: Iterable[Block], num_train: int, num_tokens: int, count: int, seed: int
) -> Int64[NDArray[np.int64], "{count} {num_tokens}"]:
    """Tokens of `count` images. Each token is copied from a random training image at the same position."""
    rows = stream(seed, Purpose.MARGINALS).integers(num_train, size=(count, num_tokens))
    sampled, first = np.empty(rows.shape, dtype=np.int64), 0
    for block in train:
        here = (rows >= first) & (rows < first + len(block))
        sampled[here] = block[rows[here] - first, here.nonzero()[1]]
        first += len(block)
    return sampled


def _counts(blocks: Iterable[Block], codebook_size: int) -> tuple[Int64[NDArray[np.int64], "T V"], int]:
    """Counts of each code at each position, and the number of images."""
    counts, images = np.zeros((0, codebook_size), dtype=np.int64), 0
    for block in blocks:
        if not len(counts):
            counts = np.zeros((block.shape[1], codebook_size), dtype=np.int64)
        for position, column in enumerate(block.T):
            counts[position] += np.bincount(column, minlength=codebook_size)
        images += len(block)
    return counts, images
