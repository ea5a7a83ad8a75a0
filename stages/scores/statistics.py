"""Mean and covariance of features in float64, mergeable from parts of any size.

Every score checks its input here: a broken image set is an error, not a bad score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float64, Shaped
from numpy.typing import NDArray

from stages.runtime.arrays import DoubleMatrix

Unchecked = Shaped[NDArray[np.floating], "..."]
"""An array of any shape and type. `finite_doubles` checks both."""
_BLOCK_ROWS = 16_384  # 268 MB in float64 at D = 2048; the features of all of ImageNet would not fit


def finite_doubles(values: Unchecked, what: str) -> DoubleMatrix:
    """A copy of `values` (n, D) in float64. `what` names the values in errors.

    Raises:
        ValueError: The values are not a matrix with at least one row, not floating point, or not finite.
    """
    if values.ndim != 2 or not len(values) or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{what} are {values.dtype} of shape {values.shape}, expected floats (n, D) with n >= 1")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} hold non-finite values: the images or the network are broken")
    return values.astype(np.float64)


@dataclass(frozen=True)
class FeatureStats:
    """Count, mean and scatter matrix of feature vectors. Parts can be merged."""

    n: int
    mean: Float64[NDArray[np.float64], " D"]
    scatter: Float64[NDArray[np.float64], "D D"]
    """Sum of the outer products of deviations from the mean."""

    @classmethod
    def of(cls, features: Unchecked) -> FeatureStats:
        """Statistics of features (n, D), computed a block of rows at a time.

        Raises:
            ValueError: The features are not a matrix with at least one row, not floating point, or not finite.
        """
        starts = range(0, max(len(features), 1), _BLOCK_ROWS)
        return reduce(cls.merge, (cls._of_block(features[first : first + _BLOCK_ROWS]) for first in starts))

    @classmethod
    def _of_block(cls, features: Unchecked) -> FeatureStats:
        wide = finite_doubles(features, "features")
        mean = wide.mean(axis=0)
        wide -= mean
        return cls(len(wide), mean, wide.T @ wide)

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Statistics of the union of both sets. The formula is stable for features with a large offset."""
        n = self.n + other.n
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        return FeatureStats(n, self.mean + shift * (other.n / n), scatter)

    @property
    def covariance(self) -> Float64[NDArray[np.float64], "D D"]:
        """Sample covariance, with divisor n - 1 as in the reference implementations.

        Raises:
            ValueError: There are fewer than two feature vectors.
        """
        if self.n < 2:
            raise ValueError(f"{self.n} feature vectors, expected at least 2 for a covariance")
        return self.scatter / (self.n - 1)
