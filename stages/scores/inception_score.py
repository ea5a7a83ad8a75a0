"""Inception score from logits. Source: Salimans et al. (arXiv 1606.03498), section 4."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import NDArray

from stages.runtime.randomness import Purpose, stream
from stages.scores.statistics import finite_doubles


def inception_score(
    logits: Float[NDArray[np.floating], "N classes"], *, splits: int, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the score over `splits` parts of the samples.

    The samples are shuffled first. Without the shuffle, each part of samples sorted by class would hold few classes,
    and the score would be far too low.

    Raises:
        ValueError: There are fewer samples than parts, or logits are not finite.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{splits} splits of {len(logits)} samples, expected between 1 and the number of samples")
    order = stream(seed, Purpose.INCEPTION_SCORE).permutation(len(logits))
    wide = finite_doubles(logits, "logits")[order]
    wide -= wide.max(axis=1, keepdims=True)
    log_p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    scores = [_score(part) for part in np.array_split(log_p, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(log_p: Float64[NDArray[np.float64], "n classes"]) -> float:
    """Exponential of the mean KL divergence between each sample's class distribution and the marginal one."""
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
