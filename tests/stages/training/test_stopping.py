"""A run that is asked to stop finishes its step, saves it, and goes on from there to the same weights."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import interrupt, objective, training

from conf.runtime import RuntimeConfig
from stages.runtime.artifact import read_json
from stages.runtime.distributed import World
from stages.runtime.errors import ArtifactError, Interrupted
from stages.runtime.interruption import Interruption
from stages.runtime.job import Job
from stages.training import loop
from stages.training.checkpoint import load_latest
from stages.training.loop import CHECKPOINTS, train_model

WORLD = World(0, 1, torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu")
STAGE = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + '/tests']
import torch
from conf.section import Section
import toy_training as toy
from stages.runtime.distributed import process_group
from stages.runtime.job import main
from stages.training.loop import train_model


def work(config, inputs, output, runtime):
    run = toy.training("llamagen", toy.objective("llamagen"), steps=100_000)
    with process_group(runtime) as world:
        train_model(run, output, world, runtime)


main(work, Section)
"""


def saved_step(output: Path) -> int:
    state = load_latest(output / CHECKPOINTS, WORLD.device)
    assert state is not None
    return int(state["step"])


def test_a_training_cancelled_at_step_10_goes_on_from_step_10(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole, broken = objective("dpar", dropout=0.3), objective("dpar", dropout=0.3)
    train_model(training("dpar", whole), tmp_path / "whole", WORLD, RUNTIME)
    run = training("dpar", broken)
    interrupt(run, 9)
    message = "^interrupted by SIGTERM after step 10 of 20, which is saved; run again to resume$"
    with pytest.raises(Interrupted, match=message):
        train_model(run, tmp_path / "broken", WORLD, RUNTIME)
    assert saved_step(tmp_path / "broken") == 10
    resumed = objective("dpar", dropout=0.3)
    train_model(training("dpar", resumed), tmp_path / "broken", WORLD, RUNTIME)
    assert "resuming from step 10" in caplog.text
    weights = whole.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in resumed.state_dict().items())


def test_a_stop_in_the_last_step_leaves_only_what_comes_after_it(tmp_path: Path) -> None:
    run = training("llamagen", objective("llamagen"))
    interrupt(run, 19)
    with pytest.raises(Interrupted, match="after step 20 of 20"):
        train_model(run, tmp_path, WORLD, RUNTIME)
    train_model(training("llamagen", objective("llamagen")), tmp_path, WORLD, RUNTIME)
    assert saved_step(tmp_path) == 20


def test_checkpoints_by_the_clock_change_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, timed = objective("llamagen", dropout=0.3), objective("llamagen", dropout=0.3)
    train_model(training("llamagen", plain), tmp_path / "plain", WORLD, RUNTIME)
    saved: list[int] = []
    original = loop.save_checkpoint

    def save(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
        saved.append(step)
        original(folder, step, state, keep=keep)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    ticks = iter(range(0, 10**6, 7))  # a clock that moves by seven seconds whenever it is read
    monkeypatch.setattr(
        loop, "Interruption", lambda world, minutes: Interruption(world, minutes, lambda: float(next(ticks)))
    )
    runtime = RuntimeConfig(device="cpu", checkpoint_minutes=0.5)
    train_model(training("llamagen", timed), tmp_path / "timed", WORLD, runtime)
    assert len(saved) > 3
    assert saved[-1] == 20
    assert all(torch.equal(plain.state_dict()[name], weight) for name, weight in timed.state_dict().items())


def test_a_checkpoint_is_written_before_the_heldout_loss(tmp_path: Path) -> None:
    """It may take minutes, in which a kill would lose the steps before it."""
    seen = []

    def validate() -> dict[str, float]:
        seen.append(saved_step(tmp_path))
        return {}

    run = training("llamagen", objective("llamagen"), checkpoint_every=8)
    object.__setattr__(run, "validate", validate)
    train_model(run, tmp_path, WORLD, RUNTIME)
    assert seen == [8, 16, 20]


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"learning_rate": 0.01}, "llamagen", r"learning_rate 0.001, expected 0.01: they belong to other settings"),
        ({}, "dpar", r"are of another model \(.*\): remove them to train from the start"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, float], name: str, message: str
) -> None:
    train_model(training("llamagen", objective("llamagen")), tmp_path, WORLD, RUNTIME)
    with pytest.raises(ArtifactError, match=message) as caught:
        train_model(training(name, objective(name), **changes), tmp_path, WORLD, RUNTIME)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_process_of_a_stage_ends_with_a_clear_line(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(Path(__file__).resolve().parents[3])))
    output = tmp_path / "out"
    job = Job(stage="x", config={}, inputs={}, output=output, runtime={"device": "cpu", "threads": 1})
    job.write(tmp_path / "job.json")
    command = [sys.executable, str(tmp_path / "stage.py"), "--job", str(tmp_path / "job.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = output / "record/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code
    error = read_json(output / "record/error.json")
    step = saved_step(output)
    assert step > 2
    assert error["kind"] == "Interrupted"
    assert error["message"].startswith(f"interrupted by {number.name} after step {step} of 100000")
    assert "Traceback" not in said
