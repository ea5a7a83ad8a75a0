"""`dpar plan` and `dpar bench plan`: tables, JSON and user errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.gates import Gate
from pipeline.budget import cards
from pipeline.cli import measure
from pipeline.cli.main import run_command
from pipeline.graph import STAGES

COMMAND = ["plan", "--preset", "tiny", "--images", "1000", "--gpu", "h100"]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], image_root: Path, tmp_path: Path) -> Callable[..., str]:
    def plan(*options: str) -> str:
        places = ["--set", f"dataset.root={image_root}", "--set", f"runtime.home={tmp_path}"]
        assert run_command([*COMMAND, *places, *options]) == 0
        return capsys.readouterr().out

    return plan


@pytest.mark.slow
def test_the_table_has_every_stage_and_says_what_it_assumes(plan: Callable[..., str]) -> None:
    lines = plan("--gpus", "4", "--mfu", "0.5").splitlines()
    assert lines[0] == "images   1,000 in 2 views (--images, 200 held out)"
    assert "4 x h100: 80.0 GB, 989 TFLOP/s bfloat16" in lines[2]
    assert "50% of that in training and forward passes" in lines[3]
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in STAGES][:10] == list(STAGES)
    assert lines[-1] == "everything fits on 4 x h100"


def test_the_json_has_numbers_in_base_units(plan: Callable[..., str]) -> None:
    told: dict[str, Any] = json.loads(plan("--json", "--until", "train"))
    assert [stage["stage"] for stage in told["stages"]] == list(STAGES)[: list(STAGES).index("train") + 1]
    assert told["seconds"] == sum(stage["seconds"] for stage in told["stages"])
    assert (told["card"]["name"], told["devices"], told["warnings"]) == ("h100", 1, [])
    assert told["micro_batches"]["train"].keys() == {"1", "2", "4", "8"}
    assert told["efficiency"]["training bfloat16"] == 0.35


@pytest.mark.slow
def test_what_does_not_fit_is_in_the_output(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = cards.Card(
        name="small", memory=1.0005e9, bfloat16=1e14, float32=1e13, bandwidth=1e12, launch_s=1e-5, cores=8
    )
    monkeypatch.setitem(cards.GPUS, "h100", small)
    out = plan()
    assert "warning train needs" in out
    assert "none" in next(line for line in out.splitlines() if line.startswith("train") and "none" in line)


@pytest.mark.slow
def test_the_cpu_is_measured(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_PRODUCT", 64)
    monkeypatch.setattr(cards, "_COPIED", 1 << 16)
    out = plan("--gpu", "cpu")
    assert "(measured)" in out
    assert "calibrated on the demo" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "v100"], "--gpu is 'v100', expected one of cpu, a100-40"),
        (["--preset", "tiny", "--set", "dataset.root=/nowhere"], "dataset.root /nowhere is missing"),
        (["--until", "nosuch"], "stage is 'nosuch'"),
    ],
)
def test_a_user_error_is_one_line(options: list[str], message: str, user_error: Callable[[list[str]], str]) -> None:
    assert message in user_error(["plan", "--preset", "imagenet256-b", *options])


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 1)])
def test_a_plan_that_is_off_is_a_missed_gate(
    met: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = [Gate(name="train: planned / measured < 2", value=1.0, bound=2.0, met=met)]
    monkeypatch.setattr(measure, "_planned_times", lambda overrides: (gates, {"planned, s": {"train": 1.0}}))
    assert run_command(["bench", "plan"]) == code
    assert "train: planned / measured < 2" in capsys.readouterr().out


def test_planned_times_need_the_finished_demo(tmp_path: Path, user_error: Callable[[list[str]], str]) -> None:
    assert "dpar run --preset demo" in user_error(["bench", "plan", "--set", f"runtime.home={tmp_path}"])
