"""A run that is asked to stop finishes its step, saves it, and goes on from there to the same weights."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
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
import os, sys
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


for job in sys.argv[1:]:
    sys.argv = ["stage", "--job", job]
    stage = os.fork()
    if stage == 0:
        main(work, Section)
    print("ended with", os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1]))
"""


def saved_step(output: Path) -> int:
    state = load_latest(output / CHECKPOINTS, WORLD.device)
    assert state is not None
    return int(state["step"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
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


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_the_process_of_a_stage_ends_with_a_clear_line(tmp_path: Path) -> None:
    """A process that has loaded its modules becomes two stages, one after the other."""
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(Path(__file__).resolve().parents[3])))
    stops = {signal.SIGTERM: 143, signal.SIGUSR1: 138}
    command = [sys.executable, str(tmp_path / "stage.py")]
    for number in stops:
        output, path = tmp_path / number.name, tmp_path / f"{number.name}.json"
        Job(stage="x", config={}, inputs={}, output=output, runtime={"device": "cpu", "threads": 1}).write(path)
        command.append(str(path))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for number in stops:
        metrics = tmp_path / number.name / "record/metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
            time.sleep(0.05)
        (stage,) = psutil.Process(process.pid).children()
        stage.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in said
    for number, code in stops.items():
        assert f"ended with {code}" in said.splitlines()
        error, step = read_json(tmp_path / number.name / "record/error.json"), saved_step(tmp_path / number.name)
        assert step > 2
        assert error["kind"] == "Interrupted"
        assert error["message"].startswith(f"interrupted by {number.name} after step {step} of 100000")
