"""The budget of a run: sums, what does not fit, and planned beside measured times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conf.load import load_settings
from pipeline.budget import budget as budgets
from pipeline.budget import check as checking
from pipeline.budget.budget import Budget, make_budget, warnings
from pipeline.budget.cards import GPUS, Card
from pipeline.budget.check import Checked, plan_gates
from pipeline.budget.images import IMAGENET
from pipeline.budget.shape import shape_of
from pipeline.graph import STAGES
from pipeline.selection import select
from stages.runtime.errors import InputError

CPU = Card(name="cpu", memory=8e9, bfloat16=1e10, float32=1e11, bandwidth=1e10, launch_s=1e-5, cores=2)


def budget(*overrides: str, preset: str = "tiny", card: Card = GPUS["h100"], devices: int = 1) -> Budget:
    settings, _ = load_settings(preset, None, list(overrides))
    return make_budget(settings, shape_of(settings, *IMAGENET, "test"), select(settings), card, devices=devices)


def test_every_stage_is_planned_and_summed() -> None:
    found = budget()
    assert [stage.stage for stage in found.stages] == list(STAGES)
    assert found.seconds == sum(stage.time.seconds for stage in found.stages)
    assert found.disk > sum(stage.disk.kept for stage in found.stages)
    assert all(stage.time.seconds > 0 and stage.host > 0 for stage in found.stages)


def test_more_cards_take_less_time_and_do_the_same_operations() -> None:
    one, eight = budget(), budget(devices=8)
    assert eight.seconds < one.seconds
    for before, after in zip(one.stages, eight.stages, strict=True):
        alone = "calibrates in one process" if before.stage == "entropy_head" else ""
        assert alone or after.flops == pytest.approx(before.flops), before.stage


def test_models_on_a_cpu_are_in_the_memory_of_the_host() -> None:
    on_cpu, on_gpu = budget(card=CPU), budget()
    train = {stage.stage: stage for stage in on_cpu.stages}["train"]
    assert train.host > train.device > 0
    assert on_gpu.stages[6].host != train.host
    with pytest.raises(InputError, match="--gpus is 2 and --gpu cpu, expected 1"):
        budget(card=CPU, devices=2)


def test_what_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(warnings(budget(), tmp_path)) == []
    small = replace(GPUS["h100"], memory=1.0005e9, name="small")
    found = "\n".join(warnings(budget(card=small), tmp_path))
    assert "train needs" in found
    assert "for one image at a time and a small has" in found
    tokenizes = replace(GPUS["h100"], memory=1.05e9, name="small")
    found = "\n".join(warnings(budget("tokenize.batch_size=4096", card=tokenizes), tmp_path))
    assert "lower tokenize.batch_size" in found
    monkeypatch.setattr(budgets, "free_disk", lambda home: 1000)
    (line,) = warnings(budget(), tmp_path)
    assert "has 1.0 kB free" in line


def test_a_training_takes_the_largest_micro_batch_that_fits() -> None:
    found = budget(preset="tiny")
    assert {stage.stage: stage.micro_batch for stage in found.stages if stage.micro_batch is not None} == {
        "tokenizer": 8,
        "entropy_model": 8,
        "train": 8,
    }


def test_gates_hold_the_plan_to_a_factor_of_two() -> None:
    times = {"good": (10.0, 12.0), "fast": (10.0, 21.0), "slow": (10.0, 4.0)}
    rows = [Checked(stage=name, planned=planned, measured=measured) for name, (planned, measured) in times.items()]
    gates, figures = plan_gates(rows)
    assert [gate.met for gate in gates] == [True, True, False, True, True, False]
    assert gates[0].name == "good: planned / measured > 0.5"
    assert figures["measured, s"] == {"good": 12.0, "fast": 21.0, "slow": 4.0}


def test_measured_times_are_those_of_the_manifests(monkeypatch: pytest.MonkeyPatch, image_root: Path) -> None:
    settings, runtime = load_settings("tiny", None, [f"dataset.root={image_root}"])
    paths = {name: Path(name) for name in STAGES}
    monkeypatch.setattr(checking, "require_cached", lambda settings, runtime, stages, command: paths)
    monkeypatch.setattr(checking, "read_manifest", lambda path: _Made(duration_s=float(len(path.name))))
    found = checking.check(settings, runtime, CPU)
    assert {row.stage: row.measured for row in found} == {name: len(name) for name in STAGES}
    assert all(row.planned > 0 for row in found)


class _Made:
    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
