"""Improved precision and recall: share of samples inside the manifold of real images, and the converse.

Source: Kynkäänniemi et al. (arXiv 1904.06991), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import NDArray

from stages.runtime.arrays import DoubleMatrix
from stages.scores.statistics import finite_doubles

_BLOCK_DISTANCES = 2**22  # 34 MB in float64; about five such arrays exist at a time


def precision_recall(
    real: Float[NDArray[np.floating], "n D"], generated: Float[NDArray[np.floating], "m D"], *, neighbours: int
) -> tuple[float, float]:
    """Share of generated features near a real one, and share of real features near a generated one.

    A feature is near another if it is no farther away than the other's k-th nearest neighbour in the other's own set,
    with k = `neighbours`.

    Raises:
        ValueError: A set has at most `neighbours` features, or features are not finite.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated features, expected more than {neighbours} neighbours"
        )
    # Features share a large offset. Without it, distances are the same and rounding errors are smaller.
    centred_real = finite_doubles(real, "features of real images")
    offset = centred_real.mean(axis=0)
    centred_real -= offset
    centred_generated = finite_doubles(generated, "features of generated images") - offset
    precision = _share_inside(centred_generated, centred_real, _radii(centred_real, neighbours))
    recall = _share_inside(centred_real, centred_generated, _radii(centred_generated, neighbours))
    return precision, recall


def _radii(features: DoubleMatrix, neighbours: int) -> Float64[NDArray[np.float64], " n"]:
    """Squared distance of each feature to its k-th nearest neighbour other than itself."""
    blocks = [
        np.partition(block, neighbours, axis=1)[:, neighbours] for block in _squared_distances(features, features)
    ]
    return np.concatenate(blocks)


def _share_inside(
    points: Float64[NDArray[np.float64], "n D"],
    centres: Float64[NDArray[np.float64], "m D"],
    radii: Float64[NDArray[np.float64], " m"],
) -> float:
    """Share of the points inside the sphere of at least one centre. Radii are squared."""
    inside = [(block <= radii).any(axis=1) for block in _squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared_distances(
    rows: Float64[NDArray[np.float64], "n D"], columns: Float64[NDArray[np.float64], "m D"]
) -> Iterator[Float64[NDArray[np.float64], "_ m"]]:
    """Squared distances of all pairs, a block of rows at a time."""
    squares = (columns**2).sum(axis=1)
    step = max(1, _BLOCK_DISTANCES // len(columns))
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        distances = (block**2).sum(axis=1)[:, None] + squares - 2 * block @ columns.T
        yield distances.clip(min=0.0)
