"""Training under a real torchrun: any number of processes takes the same steps, also when it resumes on another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toy_game
import toy_processes
from toy_processes import NAMES, toy, train
from toy_training import interrupt

import stages
from stages.runtime.distributed import World
from stages.runtime.errors import Interrupted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes: sums depend on it in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Path:
    """What `toy_processes` leaves on two processes. This process alone has begun `noisy`."""
    folder = tmp_path_factory.mktemp("two")
    run = toy(noise=0.3)
    interrupt(run, 11)  # two passes a step; on two processes it will be one, and they agree on a stop a step later
    with pytest.raises(Interrupted, match="interrupted by SIGTERM after step 6 of 20"):
        train(run, folder / "noisy", WORLD, micro_batch=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={folder / 'logs'}", toy_processes.__file__, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(stages.__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses(output: Path) -> list[float]:
    """Loss of each of the 20 steps."""
    lines = [json.loads(line) for line in (output / "record/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(found) == list(range(1, 21))
    return list(found.values())


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_take_the_steps_of_one(two: Path, tmp_path: Path, name: str) -> None:
    train(toy(name), tmp_path, WORLD)
    assert losses(two / name) == pytest.approx(losses(tmp_path), rel=1e-6)


def test_micro_batches_on_two_processes_take_the_undivided_steps(two: Path) -> None:
    assert losses(two / "divided") == pytest.approx(losses(two / "dpar"), rel=1e-6)


@pytest.mark.usefixtures("without_shape_checks")
def test_resuming_on_other_numbers_of_processes_changes_nothing(two: Path, tmp_path: Path) -> None:
    """From one to two and back, in micro-batches, with dropout: it depends on the place in the global batch alone."""
    for rank in (0, 1):
        assert "interrupted by SIGTERM after step 13 of 20" in (two / f"stop-{rank}.txt").read_text()
    train(toy(noise=0.3), two / "noisy", WORLD, micro_batch=4)
    train(toy(noise=0.3), tmp_path / "whole", WORLD, micro_batch=4)
    whole = losses(tmp_path / "whole")
    assert losses(two / "noisy") == pytest.approx(whole, rel=1e-5)
    train(toy(), tmp_path / "without", WORLD, micro_batch=4)
    assert losses(tmp_path / "without") != pytest.approx(whole, rel=1e-3)


def test_two_processes_with_the_same_samples_train_an_adversary_as_one(two: Path, tmp_path: Path) -> None:
    """Their gradients are equal, so is the mean; and BatchNorm, which sees a process's own batch, sees the same one."""
    one, run = toy_game.training()
    train(run, tmp_path, WORLD)
    for rank in (0, 1):
        other, _ = toy_game.training()
        other.load_state_dict(torch.load(two / f"game/{rank}.pt", weights_only=True))
        assert toy_game.different(one, other) == []
