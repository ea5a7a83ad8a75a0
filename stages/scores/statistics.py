"""Statistics of features in float64, as sums that parts of any size can be merged from.

Every score checks its input here: a broken image set must fail, not score badly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
_BLOCK_ROWS = 16_384  # of 2048 features, 268 MB in float64: the features of a whole ImageNet would not fit


def finite_doubles(values: npt.NDArray[np.floating], what: str) -> npt.NDArray[np.float64]:
    """A copy of `values` (n, D) in float64; `what` names them in errors.

    Raises:
        ValueError: Not a matrix with rows, not floating point, or not finite.
    """
    if values.ndim != 2 or not len(values) or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{what} are {values.dtype} of shape {values.shape}, expected floats (n, D) with n >= 1")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} hold values that are no numbers: the images or the network are broken")
    return values.astype(np.float64)


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
