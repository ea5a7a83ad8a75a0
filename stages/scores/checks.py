"""The check that every score makes of its input: a broken image set must fail, not score badly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
