"""Improved precision and recall: are samples inside the manifold of real images, and the other way round?

Source: Kynkäänniemi et al. (arXiv 1904.06991), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from stages.scores.statistics import finite_doubles

Doubles = npt.NDArray[np.float64]
_BLOCK_DISTANCES = 2**22  # 34 MB in float64, held about five times


def precision_recall(
    real: npt.NDArray[np.floating], generated: npt.NDArray[np.floating], *, neighbours: int
) -> tuple[float, float]:
    """Share of generated features (M, D) near a real one (N, D), and share of real ones near a generated one.

    "Near" is within the distance of the other's k-th nearest neighbour among its own kind.

    Raises:
        ValueError: Not more features than `neighbours`, or features that are not finite floats.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated features, expected more than {neighbours} neighbours"
        )
    # Distances do not change with the origin, but their rounding does: features share a large offset.
    centred_real = finite_doubles(real, "features of real images")
    offset = centred_real.mean(axis=0)
    centred_real -= offset
    centred_generated = finite_doubles(generated, "features of generated images") - offset
    precision = _share_inside(centred_generated, centred_real, _radii(centred_real, neighbours))
    recall = _share_inside(centred_real, centred_generated, _radii(centred_generated, neighbours))
    return precision, recall


def _radii(features: Doubles, neighbours: int) -> Doubles:
    """Squared distance of each feature to its k-th neighbour, itself not counted."""
    blocks = [
        np.partition(block, neighbours, axis=1)[:, neighbours] for block in _squared_distances(features, features)
    ]
    return np.concatenate(blocks)


def _share_inside(points: Doubles, centres: Doubles, radii: Doubles) -> float:
    inside = [(block <= radii).any(axis=1) for block in _squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared_distances(rows: Doubles, columns: Doubles) -> Iterator[Doubles]:
    """Squared distances of all pairs, a block of rows at a time."""
    squares = (columns**2).sum(axis=1)
    step = max(1, _BLOCK_DISTANCES // len(columns))
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        distances = (block**2).sum(axis=1)[:, None] + squares - 2 * block @ columns.T
        yield distances.clip(min=0.0)
