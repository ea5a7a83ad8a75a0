"""Stage evaluate: the ladder, honest names, resume, and the networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conf.evaluate import EvaluateConfig
from conf.schema import Settings
from conf.section import Section
from pipeline.graph import STAGES
from stages.evaluate import RUNGS, score_names
from stages.runtime.artifact import read_json
from stages.runtime.errors import InputError
from stages.scores.features import Inception, Lite0
from stages.scores.frechet import frechet_distance
from stages.scores.statistics import FeatureStats

Run = Callable[[str, Section, dict[str, Path]], Path]


@pytest.fixture(scope="module")
def evaluated(tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]) -> Path:
    inputs = {name: tiny_artifacts[name] for name in STAGES["evaluate"].inputs}
    return run_in_process("evaluate", tiny_settings.evaluate, inputs)


def test_every_rung_is_scored_on_the_same_number_of_images(evaluated: Path) -> None:
    metrics = read_json(evaluated / "metrics.json")
    assert {f"fd_lite0_{rung}" for rung in RUNGS} <= set(metrics)
    counts = read_json(evaluated / "scores.json")["num_images"]
    assert counts["reference"] == 36
    assert counts["samples"] == 12
    assert {counts[rung] for rung in RUNGS if rung != "samples"} == {9}
    # Real images are nearer to real images than anything that eight steps of training make.
    assert metrics["fd_lite0_heldout"] == min(metrics[f"fd_lite0_{rung}"] for rung in RUNGS)
    assert metrics["ratio_to_random"] == pytest.approx(metrics["fd_lite0_samples"] / metrics["fd_lite0_random"])


def test_the_scores_can_be_computed_again_from_the_features(evaluated: Path) -> None:
    with np.load(evaluated / "features.npz") as features:
        assert "reference" not in features, "of a large data set they would fill the disk"
        mean, covariance = features["reference_mean"], features["reference_covariance"]
        heldout = FeatureStats.of(features["heldout"])
    reference = FeatureStats(36, mean, covariance * 35)
    expected = read_json(evaluated / "metrics.json")["fd_lite0_heldout"]
    assert frechet_distance(reference, heldout) == pytest.approx(expected, rel=1e-9)


def test_precision_looks_at_no_more_real_images_than_it_is_told_to(
    evaluated: Path, tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    config = tiny_settings.evaluate.model_copy(update={"compared": 8})
    inputs = {name: tiny_artifacts[name] for name in STAGES["evaluate"].inputs}
    output = run_in_process("evaluate", config, inputs)
    assert [read_json(folder / "scores.json")["compared_reference"] for folder in (evaluated, output)] == [36, 8]
    distances = [read_json(folder / "metrics.json")["fd_lite0"] for folder in (evaluated, output)]
    assert distances[0] == distances[1]


def test_without_the_ladder_only_the_samples_are_scored(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    config = tiny_settings.evaluate.model_copy(update={"ladder": False, "max_reference": 10})
    inputs = {name: tiny_artifacts[name] for name in STAGES["evaluate"].inputs}
    metrics = read_json(run_in_process("evaluate", config, inputs) / "metrics.json")
    assert "fd_lite0_heldout" not in metrics
    assert metrics["num_reference"] == 10


@pytest.mark.parametrize(("name", "expected"), [("lite0", "fd_lite0"), ("inception", "fid_uncertified")])
def test_no_score_is_called_fid(name: str, expected: str) -> None:
    assert score_names(SimpleNamespace(name=name))["frechet"] == expected


def test_lite0_gives_features_and_classes_and_knows_its_weights() -> None:
    extractor = Lite0(96, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features, logits = extractor.extract(images)
    assert features.shape == (3, 1280)
    assert logits.shape == (3, 1000)
    again, _ = extractor.extract(images[1:2])
    np.testing.assert_allclose(again[0], features[1], rtol=1e-3, atol=1e-4)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        Inception(tmp_path / "no.pth", torch.device("cpu"))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as weights of the FID Inception"):
        Inception(tmp_path / "bad.pth", torch.device("cpu"))
    with pytest.raises(ValueError, match="expected a weights file with inception"):
        EvaluateConfig(extractor="inception")
