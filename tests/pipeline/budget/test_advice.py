"""Warnings before stages start."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.load import load_settings
from pipeline.budget import advice as advising
from pipeline.budget.advice import advice
from pipeline.graph import STAGES
from stages.runtime.errors import ArtifactError


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without AVX-512, no GPU, and 1 TB of free disk."""
    monkeypatch.setattr(advising, "bfloat16_flags", list)
    monkeypatch.setattr(advising, "has_nvidia_device", lambda: False)
    monkeypatch.setattr(advising, "free_disk", lambda home: 10**12)


def lines(*overrides: str, preset: str = "imagenet256-b", stages: list[str] | None = None) -> list[str]:
    settings, runtime = load_settings(preset, None, list(overrides))
    return list(advice(settings, runtime, preset, list(STAGES) if stages is None else stages))


def test_every_stage_in_bfloat16_is_named_once_with_what_to_set() -> None:
    (line,) = lines()
    assert line.startswith("entropy_model, entropy_map, train, entropy_head, sample in bfloat16 on a CPU")
    assert "--set train.training.precision=float32" in line
    assert "--set sample.precision=float32" in line


def test_only_stages_that_run_and_train_count() -> None:
    assert lines(stages=["dataset", "tokenize", "patch_index", "evaluate"]) == []
    (line,) = lines(stages=["train"])
    assert line.startswith("train in bfloat16")
    assert lines("tokenizer.checkpoint=x", stages=["tokenizer"]) == [], "imported, not trained"
    assert len(lines("tokenizer.source=train", stages=["tokenizer"])) == 1
    assert lines("entropy_head.kind=none", stages=["entropy_head"]) == []


def test_presets_in_float32_are_silent() -> None:
    assert lines(preset="demo") == []


def test_fast_bfloat16_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines("runtime.device=cuda") == []
    monkeypatch.setattr(advising, "has_nvidia_device", lambda: True)
    assert lines() == []
    assert len(lines("runtime.device=cpu")) == 1
    monkeypatch.setattr(advising, "bfloat16_flags", lambda: ["avx512f"])
    assert lines("runtime.device=cpu") == []


def test_too_little_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(advising, "free_disk", lambda home: 20 * 10**9)
    (line,) = lines(f"runtime.home={tmp_path}", "entropy_map.precision=float32", stages=["tokenize", "entropy_map"])
    assert line.startswith("2 stages to run will write about 39.4 GB and")
    assert "has 20.0 GB free" in line
    assert lines(stages=["tokenize"]) == []


def test_images_that_are_missing_are_left_to_stage_dataset(tmp_path: Path) -> None:
    assert lines(f"dataset.root={tmp_path / 'missing'}", preset="tiny") == []


def test_a_damaged_index_is_left_to_the_stages_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*given: object) -> None:
        raise ArtifactError("images.parquet cannot be read")

    monkeypatch.setattr(advising, "count_images", damaged)
    assert lines(preset="tiny") == []
