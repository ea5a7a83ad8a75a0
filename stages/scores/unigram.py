"""What tokens say by their position alone: the loss that a model must beat, and images that know no more.

Tokens come in blocks of images (n, T), so that a store of any size fits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from stages.runtime.randomness import Purpose, stream

Tokens = npt.NDArray[np.integer]
_SMOOTHINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)


def best_unigram_loss(
    train: Iterable[Tokens], heldout: Iterable[Tokens], codebook_size: int, first_position: int = 0
) -> float:
    """Mean loss, nats, on held-out tokens of the best per-position unigram model of training tokens.

    The additive smoothing is the one that is best on the held-out tokens themselves, so no unigram model is better.
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
    train: Iterable[Tokens], num_train: int, num_tokens: int, count: int, seed: int
) -> npt.NDArray[np.int64]:
    """`count` images (count, T) whose every token is that of a random one of the training images at its position."""
    rows = stream(seed, Purpose.MARGINALS).integers(num_train, size=(count, num_tokens))
    drawn, first = np.empty(rows.shape, dtype=np.int64), 0
    for block in train:
        here = (rows >= first) & (rows < first + len(block))
        drawn[here] = block[rows[here] - first, here.nonzero()[1]]
        first += len(block)
    return drawn


def _counts(blocks: Iterable[Tokens], codebook_size: int) -> tuple[npt.NDArray[np.int64], int]:
    """How often each token stands at each position, (T, V), and the number of images."""
    counts, images = np.zeros((0, codebook_size), dtype=np.int64), 0
    for block in blocks:
        if not len(counts):
            counts = np.zeros((block.shape[1], codebook_size), dtype=np.int64)
        for position, column in enumerate(block.T):
            counts[position] += np.bincount(column, minlength=codebook_size)
        images += len(block)
    return counts, images
