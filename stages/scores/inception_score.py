"""Inception score from logits. Source: Salimans et al. (arXiv 1606.03498), section 4."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stages.runtime.randomness import Purpose, stream
from stages.scores.statistics import finite_doubles


def inception_score(logits: npt.NDArray[np.floating], *, splits: int, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the score over `splits` parts of the samples (N, classes).

    The samples are shuffled first: on samples sorted by class the parts would each hold few classes, and the score
    would be far too low.

    Raises:
        ValueError: Fewer samples than parts, or logits that are not finite floats.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{splits} splits of {len(logits)} samples, expected between 1 and the number of samples")
    order = stream(seed, Purpose.INCEPTION_SCORE).permutation(len(logits))
    wide = finite_doubles(logits, "logits")[order]
    wide -= wide.max(axis=1, keepdims=True)
    log_p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    scores = [_score(part) for part in np.array_split(log_p, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(log_p: npt.NDArray[np.float64]) -> float:
    """Exp of the mean divergence of each sample's classes from those of all samples."""
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
