"""Fréchet distance between Gaussians fitted to features, in float64.

Source: Heusel et al. (arXiv 1706.08500), equation 6. With the 2015 Inception network this is FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from stages.scores.checks import finite_doubles

Doubles = npt.NDArray[np.float64]
_BLOCK_ROWS = 16_384  # of 2048 features, 268 MB in float64: the features of a whole ImageNet would not fit


@dataclass(frozen=True)
class FeatureStats:
    """Mean and covariance of n feature vectors, as sums that parts can be merged from."""

    n: int
    mean: Doubles
    scatter: Doubles
    """Sum of the outer products of deviations from the mean, (D, D)."""

    @classmethod
    def of(cls, features: npt.NDArray[np.floating]) -> FeatureStats:
        """Statistics of features (n, D), a block of rows at a time.

        Raises:
            ValueError: Not a matrix with rows, not floating point, or not finite.
        """
        starts = range(0, max(len(features), 1), _BLOCK_ROWS)
        return reduce(cls.merge, (cls._of_block(features[first : first + _BLOCK_ROWS]) for first in starts))

    @classmethod
    def _of_block(cls, features: npt.NDArray[np.floating]) -> FeatureStats:
        wide = finite_doubles(features, "features")
        mean = wide.mean(axis=0)
        wide -= mean
        return cls(len(wide), mean, wide.T @ wide)

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Statistics of both sets together; exact, whatever the offset of the features."""
        n = self.n + other.n
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        return FeatureStats(n, self.mean + shift * (other.n / n), scatter)

    @property
    def covariance(self) -> Doubles:
        """Sample covariance, divided by n - 1 as the reference implementations do."""
        if self.n < 2:
            raise ValueError(f"{self.n} feature vectors, expected at least 2 for a covariance")
        return self.scatter / (self.n - 1)


def frechet_distance(first: FeatureStats, second: FeatureStats) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

    The trace of the root is the sum of the roots of the eigenvalues of C1^1/2 C2 C1^1/2, which is symmetric: no complex
    numbers, and rank-deficient covariances (fewer samples than features) are no special case.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features are {first.mean.size} and {second.mean.size} wide, expected the same network")
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.covariance @ root)
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(difference @ difference + traces - 2 * np.sqrt(product.clip(min=0.0)).sum(), 0.0))
