"""Stage sample: classes by policy, the same image for the same number, resume, and boundaries that follow the rule."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.runtime import RuntimeConfig
from conf.sample import SampleConfig
from conf.schema import Settings
from conf.section import Section
from stages.runtime.artifact import read_json
from stages.runtime.errors import ArtifactError
from stages.sample import sample, sample_labels
from stages.stores.samples import SampleStore
from stages.stores.units import UnitWriter
from stages.views.sample import shown_classes

Run = Callable[[str, Section, dict[str, Path]], Path]
TRAINING_LABELS = np.repeat(np.arange(4), [60, 25, 10, 5]).astype(np.uint16)


@pytest.fixture(scope="module")
def in_fives(tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]) -> Path:
    """The samples of the tiny artifacts again, in batches of 5, 5 and 2 where those had batches of 4."""
    config = tiny_settings.sample.model_copy(update={"batch_size": 5})
    return run_in_process("sample", config, tiny_artifacts)


def labels(policy: str, count: int, seed: int = 0) -> np.ndarray:
    return sample_labels(SampleConfig(num_samples=count, labels=policy, seed=seed), TRAINING_LABELS, 4)


def test_classes_follow_their_policy() -> None:
    assert np.bincount(labels("balanced", 42)).tolist() == [11, 11, 10, 10]
    assert np.bincount(labels("data", 40)).tolist() == [24, 10, 4, 2]
    uniform = np.bincount(labels("uniform", 4000))
    assert uniform.min() > 900
    assert not np.array_equal(labels("data", 40), np.sort(labels("data", 40)))
    assert not np.array_equal(labels("uniform", 40), labels("uniform", 40, seed=1))


def test_the_artifact_holds_images_and_the_rule_that_cut_them(tiny_artifacts: dict[str, Path]) -> None:
    path = tiny_artifacts["sample"]
    store = SampleStore.open(path / "samples.zarr")
    assert len(store) == 12
    assert store.images(np.arange(12)).shape == (12, 32, 32, 3)
    assert store.patch_starts[:, :2].all()  # the first token is alone
    assert read_json(path / "boundaries.json") == {
        "source": "entropy_head",
        "threshold": read_json(tiny_artifacts["entropy_head"] / "thresholds.json")["entropy_head"],
        "max_length": 4,
        "row_boundary": True,
        "grid": 8,
    }


def test_the_view_shows_samples_of_each_class(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, draw_view: Run
) -> None:
    store = SampleStore.open(tiny_artifacts["sample"] / "samples.zarr")
    view = draw_view("sample", tiny_settings.sample, tiny_artifacts)
    lengths = [length for starts in store.patch_starts for length in np.diff(np.append(np.flatnonzero(starts), 64))]
    numbers = read_json(view / "metrics.json")
    assert numbers["num_samples"] == 12
    assert numbers["sample_mean_patch_length"] == pytest.approx(np.mean(lengths), rel=1e-12)
    with Image.open(view / "grid.png") as picture:
        pixels = np.asarray(picture)
    side, margin = 3 * 32, 6  # small images are enlarged
    for label in range(3):
        for column, number in enumerate(np.flatnonzero(store.labels == label)[: tiny_settings.sample.grid_columns]):
            top, left = margin + label * (side + margin), pixels.shape[1] - (2 - column) * (side + margin)
            shown = pixels[top : top + side : 3, left : left + side : 3]
            assert np.array_equal(shown, store.images(np.array([number]))[0])


def test_patches_keep_to_the_rule(tiny_artifacts: dict[str, Path]) -> None:
    store = SampleStore.of(tiny_artifacts)
    assert store.patch_starts.reshape(12, 8, 8)[:, :, 0].all()  # a row opens a patch
    for starts in store.patch_starts:
        lengths = np.diff(np.append(np.flatnonzero(starts), 64))
        assert lengths.max() <= 4


@pytest.mark.slow
def test_batch_size_does_not_change_the_samples(in_fives: Path, tiny_artifacts: dict[str, Path]) -> None:
    again = SampleStore.open(in_fives / "samples.zarr")
    store = SampleStore.open(tiny_artifacts["sample"] / "samples.zarr")
    assert np.array_equal(again.labels, store.labels)
    assert (again.tokens != store.tokens).mean() < 0.01  # equal up to float noise of another batch shape


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_longer_maximum_and_an_unreachable_threshold_give_longer_patches(
    tiny_settings: Settings, run_in_process: Run, tiny_artifacts: dict[str, Path]
) -> None:
    config = tiny_settings.sample.model_copy(update={"threshold": 100.0, "max_length": 8, "num_samples": 2})
    store = SampleStore.open(run_in_process("sample", config, tiny_artifacts) / "samples.zarr")
    # Only the forced starts remain: 0, 1, and the start of each row.
    assert (store.patch_starts.sum(axis=1) == 9).all()


@pytest.mark.slow
def test_batches_need_not_divide_the_samples(in_fives: Path, tiny_artifacts: dict[str, Path]) -> None:
    store = SampleStore.open(in_fives / "samples.zarr")
    assert [len(block) for block in store.blocks()] == [5, 5, 2]
    assert read_json(in_fives / "record" / "progress.json")["done"] == 12
    assert np.array_equal(store.labels, SampleStore.of(tiny_artifacts).labels)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("threshold", "share", "words"), [(100.0, 0.0, "by no entropy .* rows and max_length"), (-1.0, 1.0, "single")]
)
def test_a_threshold_that_never_or_always_cuts_is_said_and_counted(
    tiny_settings: Settings,
    run_in_process: Run,
    draw_view: Run,
    tiny_artifacts: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    threshold: float,
    share: float,
    words: str,
) -> None:
    config = tiny_settings.sample.model_copy(update={"threshold": threshold, "num_samples": 2})
    made = run_in_process("sample", config, tiny_artifacts)
    numbers = read_json(draw_view("sample", config, tiny_artifacts | {"sample": made}) / "metrics.json")
    assert (numbers["threshold"], numbers["share_above_threshold"]) == (threshold, share)
    assert numbers["sample_mean_patch_length"] == (1.0 if share else pytest.approx(64 / 17))
    assert re.search(words, caplog.text)


def test_a_threshold_between_is_counted_and_not_warned_of(
    tiny_artifacts: dict[str, Path], tiny_settings: Settings, draw_view: Run, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = read_json(draw_view("sample", tiny_settings.sample, tiny_artifacts) / "metrics.json")
    threshold = read_json(tiny_artifacts["entropy_head"] / "thresholds.json")["entropy_head"]
    with np.load(tiny_artifacts["entropy_head"] / "entropies.npz") as saved:
        share = (saved["entropy_head"][:, 1:] > np.float32(threshold)).mean()
    assert (numbers["threshold"], numbers["share_above_threshold"]) == (threshold, pytest.approx(share, rel=1e-12))
    assert 0 < share < 1
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_full_disk_keeps_finished_units_and_the_same_bytes_come_later(
    tiny_settings: Settings,
    tiny_artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, written, full = UnitWriter.write, list[int](), True

    def on_a_disk(self: UnitWriter, unit: int, **blocks: np.ndarray) -> None:
        if full and unit == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, unit, **blocks)
        written.append(unit)

    monkeypatch.setattr(UnitWriter, "write", on_a_disk)
    given = (tiny_settings.sample, tiny_artifacts, tmp_path, RuntimeConfig(threads=2))
    with pytest.raises(OSError, match="No space left"):
        sample(*given)
    with pytest.raises(ArtifactError, match="complete=False"):
        SampleStore.open(tmp_path / "samples.zarr")
    monkeypatch.setattr(
        UnitWriter, "write", lambda *given, **blocks: (written.append(given[1]), write(*given, **blocks))
    )
    sample(*given)
    assert written == [0, 1, 2], "a finished unit is not drawn again"
    for name in ("samples.zarr/zarr.json", "boundaries.json"):
        assert (tmp_path / name).read_bytes() == (tiny_artifacts["sample"] / name).read_bytes()


@pytest.mark.parametrize("policy", ["uniform", "balanced"])
def test_any_5000_consecutive_of_50000_samples_mix_the_classes(policy: str) -> None:
    """The Inception score is a mean over ten such parts: sorted classes would ruin it."""
    config = SampleConfig(num_samples=50_000, labels=policy)
    labels = sample_labels(config, TRAINING_LABELS, 1000)
    for part in np.split(labels, 10):
        counts = np.bincount(part, minlength=1000)
        assert (counts > 0).sum() > 970
        assert counts.max() < 20
    totals = np.bincount(labels, minlength=1000)
    assert (totals == 50).all() if policy == "balanced" else totals.std() == pytest.approx(50**0.5, rel=0.1)


def test_the_grid_of_many_classes_shows_evenly_spread_ones() -> None:
    assert shown_classes(9).tolist() == list(range(9))
    shown = shown_classes(1000)
    assert len(shown) == 20
    assert (shown[0], shown[-1]) == (0, 999)
