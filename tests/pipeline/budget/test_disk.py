"""Closed forms of disk space against the layouts of the stores and the size of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from conf.load import load_settings
from conf.schema import Settings
from pipeline.budget.budget import free_disk, peak_disk
from pipeline.budget.disk import DISKS, Disk, for_every_stage
from pipeline.budget.images import ImageCount
from pipeline.budget.shape import Shape, shape_of
from pipeline.graph import STAGES
from stages.images.decode import view_names
from stages.stores.entropies import EntropyFacts
from stages.stores.layout import StoreSpec
from stages.stores.samples import SampleFacts
from stages.stores.tokens import TokenFacts

COUNT = ImageCount(8192, 10, "test")


def settings_and_shape(*overrides: str) -> tuple[Settings, Shape]:
    settings, _ = load_settings("imagenet256-b", None, list(overrides))
    return settings, shape_of(settings, *COUNT)


def stored(spec: StoreSpec) -> int:
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in spec.arrays)


def test_stores() -> None:
    settings, shape = settings_and_shape("sample.num_samples=100")
    common = {
        "num_images": 8192,
        "num_train": 8192,
        "num_views": 20,
        "num_tokens": 256,
        "grid": 16,
        "chunk_rows": 8192,
        "codebook_size": 16384,
    }
    tokens = TokenFacts(
        **common,
        num_classes=10,
        image_size=256,
        views="ten_crop_x2",
        view_names=view_names("ten_crop_x2"),
        vq_sha256="",
    )
    entropies = EntropyFacts(**common, tokens_digest="", model_sha256="", precision="bfloat16")
    samples = SampleFacts(
        num_samples=100, num_classes=10, num_tokens=256, grid=16, codebook_size=16384, image_size=256, chunk_rows=32
    )
    for name, facts in (("tokenize", tokens), ("entropy_map", entropies), ("sample", samples)):
        assert DISKS[name](settings, shape).kept == pytest.approx(stored(facts.spec()), rel=1e-3), name
    assert DISKS["patch_index"](settings, shape).kept == 8192 * 20 * 32


def test_a_training_keeps_weights_and_a_checkpoint_and_has_a_spare_while_it_runs() -> None:
    settings, shape = settings_and_shape("train.model=L")
    parameters = 351_306_752 - 990 * 1024  # with 1000 classes, less those that the ten classes leave out
    assert DISKS["train"](settings, shape) == Disk(kept=parameters * 16, extra=parameters * 12)
    averaged, _ = settings_and_shape("train.model=L", "train.training.ema_decay=0.999")
    assert DISKS["train"](averaged, shape) == Disk(kept=parameters * 20, extra=parameters * 16)
    imported, _ = settings_and_shape("train.family=llamagen", "train.source=checkpoint", "train.checkpoint=x")
    assert DISKS["train"](imported, shape).extra == 0
    foreign, _ = settings_and_shape("entropy_model.source=checkpoint", "entropy_model.checkpoint=x")
    assert DISKS["entropy_model"](foreign, shape).extra == 0


def test_the_peak_is_all_artifacts_and_the_largest_spare() -> None:
    assert peak_disk([Disk(kept=5, extra=3), Disk(kept=7, extra=4)]) == 16
    assert peak_disk([]) == 0


def test_the_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "there") > 0


def test_every_stage_has_an_entry() -> None:
    settings, shape = settings_and_shape()
    assert all(DISKS[name](settings, shape).kept > 0 for name in STAGES)
    with pytest.raises(AssertionError, match="evaluate"):
        for_every_stage({name: 1 for name in STAGES if name != "evaluate"})
