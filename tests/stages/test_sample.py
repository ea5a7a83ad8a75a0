"""Stage sample: classes by policy, the same image for the same number, resume, and boundaries that follow the rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import SampleConfig, Section, Settings
from pipeline.graph import STAGES
from stages.artifact import read_json
from stages.drawing import resize
from stages.sample import draw_labels
from stages.stores.samples import SampleStore

Run = Callable[[str, Section, dict[str, Path]], Path]
TRAINING_LABELS = np.repeat(np.arange(4), [60, 25, 10, 5]).astype(np.uint16)


def labels(policy: str, count: int, seed: int = 0) -> np.ndarray:
    return draw_labels(SampleConfig(num_samples=count, labels=policy, seed=seed), TRAINING_LABELS, 4)


def test_classes_follow_their_policy() -> None:
    assert np.bincount(labels("balanced", 42)).tolist() == [11, 11, 10, 10]
    assert np.bincount(labels("data", 40)).tolist() == [24, 10, 4, 2]
    uniform = np.bincount(labels("uniform", 4000))
    assert uniform.min() > 900
    assert not np.array_equal(labels("data", 40), np.sort(labels("data", 40)))
    assert not np.array_equal(labels("uniform", 40), labels("uniform", 40, seed=1))


def test_resizing_is_bicubic_without_antialiasing_and_nothing_at_equal_size() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert resize(images, 8) is images
    expected = torch.nn.functional.interpolate(images, size=(6, 6), mode="bicubic", antialias=False)
    assert torch.equal(resize(images, 6), expected)


def inputs(artifacts: dict[str, Path]) -> dict[str, Path]:
    return {name: artifacts[name] for name in STAGES["sample"].inputs}


def test_the_artifact_holds_images_pictures_and_numbers(tiny_artifacts: dict[str, Path]) -> None:
    path = tiny_artifacts["sample"]
    store = SampleStore.open(path / "samples.zarr")
    assert len(store) == 12
    assert store.images(np.arange(12)).shape == (12, 32, 32, 3)
    assert store.patch_starts[:, :2].all()  # the first token is alone
    assert (path / "grid.png").stat().st_size > 0
    assert (path / "patches.png").stat().st_size > 0
    lengths = 64 / store.patch_starts.sum(axis=1)
    assert read_json(path / "metrics.json")["sample_mean_patch_length"] == pytest.approx(64 / (64 / lengths).mean())


def test_patches_keep_to_the_rule(tiny_artifacts: dict[str, Path]) -> None:
    store = SampleStore.open(tiny_artifacts["sample"] / "samples.zarr")
    assert store.patch_starts.reshape(12, 8, 8)[:, :, 0].all()  # a row opens a patch
    for starts in store.patch_starts:
        lengths = np.diff(np.append(np.flatnonzero(starts), 64))
        assert lengths.max() <= 4


def test_batch_size_does_not_change_the_samples(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    other = tiny_settings.sample.model_copy(update={"batch_size": 6})
    again = SampleStore.open(run_in_process("sample", other, inputs(tiny_artifacts)) / "samples.zarr")
    store = SampleStore.open(tiny_artifacts["sample"] / "samples.zarr")
    assert np.array_equal(again.labels, store.labels)
    assert (again.tokens != store.tokens).mean() < 0.01  # equal up to float noise of another batch shape


def test_a_longer_maximum_and_an_unreachable_threshold_give_longer_patches(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    config = tiny_settings.sample.model_copy(update={"threshold": 100.0, "max_length": 8})
    store = SampleStore.open(run_in_process("sample", config, inputs(tiny_artifacts)) / "samples.zarr")
    # Only the forced starts remain: 0, 1, and the start of each row.
    assert (store.patch_starts.sum(axis=1) == 9).all()
