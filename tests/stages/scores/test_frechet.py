"""Fréchet distance: closed forms, parts and orders, few samples, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from stages.scores.frechet import frechet_distance
from stages.scores.statistics import FeatureStats

RNG = np.random.default_rng(0)


def stats(mean: np.ndarray, covariance: np.ndarray) -> FeatureStats:
    return FeatureStats(1001, mean, covariance * 1000)


def rotation(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]


@pytest.mark.parametrize("rotated", [False, True])
def test_gaussians_with_common_axes_have_a_closed_form(rotated: bool) -> None:
    a, b, shift = RNG.uniform(0.1, 3, 16), RNG.uniform(0.1, 3, 16), RNG.normal(size=16)
    turn = rotation(16) if rotated else np.eye(16)
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(stats(np.zeros(16), turn @ np.diag(a) @ turn.T), stats(shift, turn @ np.diag(b) @ turn.T))
    assert found == pytest.approx(expected, rel=1e-12)


def test_gaussians_without_common_axes_have_one_too() -> None:
    # With C2 = T C1 T the root of C1 C2 has the trace of C1 T.
    first = (root := RNG.normal(size=(12, 12))) @ root.T + np.eye(12)
    transport = (root := RNG.normal(size=(12, 12))) @ root.T + np.eye(12)
    second = transport @ first @ transport
    expected = np.trace(first) + np.trace(second) - 2 * np.trace(first @ transport)
    found = frechet_distance(stats(np.zeros(12), first), stats(np.zeros(12), second))
    assert found == pytest.approx(expected, rel=1e-10)


def test_statistics_are_numpys_and_merging_parts_changes_nothing() -> None:
    features = RNG.normal(size=(500, 20)) + 1000.0
    whole = FeatureStats.of(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), rtol=1e-9)
    merged = FeatureStats.of(features[:7])
    for part in np.array_split(features[7:], 6):
        merged = merged.merge(FeatureStats.of(part))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9)
    assert frechet_distance(whole, merged) < 1e-9


def test_the_order_of_samples_does_not_matter_and_float32_features_do() -> None:
    features, other = RNG.normal(size=(300, 8)), RNG.normal(size=(300, 8)) * 1.5
    distance = frechet_distance(FeatureStats.of(features), FeatureStats.of(other))
    shuffled = FeatureStats.of(RNG.permutation(features))
    assert frechet_distance(shuffled, FeatureStats.of(other)) == pytest.approx(distance, rel=1e-12)
    single = FeatureStats.of(features.astype(np.float32))
    assert frechet_distance(single, FeatureStats.of(other)) == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize("count", [50, 200])
def test_fewer_samples_than_features_are_at_no_distance_from_themselves(count: int) -> None:
    features = RNG.normal(size=(count, 256))
    assert frechet_distance(FeatureStats.of(features), FeatureStats.of(features)) < 1e-4


def test_equals_torch_fidelity_on_the_same_features() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    import torch

    first, second = RNG.normal(size=(400, 32)), RNG.normal(size=(400, 32)) @ rotation(32) * 1.3 + 0.2
    theirs = fidelity.fid_statistics_to_metric(
        fidelity.fid_features_to_statistics(torch.from_numpy(first)),
        fidelity.fid_features_to_statistics(torch.from_numpy(second)),
        verbose=False,
    )["frechet_inception_distance"]
    ours = frechet_distance(FeatureStats.of(first), FeatureStats.of(second))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_bad_features_are_refused_by_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="uint8 of shape"):
        FeatureStats.of(np.zeros((3, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="non-finite"):
        FeatureStats.of(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="1 feature vectors, expected at least 2"):
        frechet_distance(FeatureStats.of(np.zeros((1, 3))), FeatureStats.of(np.zeros((5, 3))))
    with pytest.raises(ValueError, match="3 and 4 wide"):
        frechet_distance(FeatureStats.of(np.zeros((5, 3))), FeatureStats.of(np.zeros((5, 4))))
