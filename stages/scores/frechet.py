"""Fréchet distance between Gaussians fitted to features, in float64.

Source: Heusel et al. (arXiv 1706.08500), equation 6. With the 2015 Inception network this is FID.
"""

from __future__ import annotations

import numpy as np

from stages.scores.statistics import FeatureStats


def frechet_distance(first: FeatureStats, second: FeatureStats) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

    The trace of the root is the sum of the roots of the eigenvalues of C1^1/2 C2 C1^1/2. This matrix is symmetric, so
    no complex numbers occur, and rank-deficient covariances (fewer samples than features) need no special case.

    Raises:
        ValueError: The features have different widths.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features are {first.mean.size} and {second.mean.size} wide, expected the same network")
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.covariance @ root)
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(difference @ difference + traces - 2 * np.sqrt(product.clip(min=0.0)).sum(), 0.0))
