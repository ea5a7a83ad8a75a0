"""What tokens say by their position alone: the loss that a model must beat, and images that know no more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]
_SMOOTHINGS = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)


def best_unigram_loss(train: Tokens, heldout: Tokens, codebook_size: int, first_position: int = 0) -> float:
    """Mean loss, nats, on held-out tokens (M, T) of the best per-position unigram model of training tokens (N, T).

    The additive smoothing is the one that is best on the held-out tokens themselves, so no unigram model is better.
    Positions before `first_position` are left out.
    """
    seen = np.stack([_counts(train[:, t], codebook_size)[heldout[:, t]] for t in range(first_position, train.shape[1])])
    losses = [
        -np.log((seen + smoothing) / (len(train) + smoothing * codebook_size)).mean() for smoothing in _SMOOTHINGS
    ]
    return float(min(losses))


def sample_marginals(train: Tokens, count: int, seed: int) -> npt.NDArray[np.int64]:
    """`count` images (count, T) whose every token is that of a random training image at the same position."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(len(train), size=(count, train.shape[1]))
    return np.take_along_axis(train, rows, axis=0).astype(np.int64)


def _counts(tokens: Tokens, codebook_size: int) -> npt.NDArray[np.int64]:
    return np.bincount(tokens, minlength=codebook_size)
