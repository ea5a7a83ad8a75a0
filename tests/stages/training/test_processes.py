"""Training under a real torchrun: any number of processes takes the same steps, also when it resumes on another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from toy_training import objective, training

import stages
from conf.runtime import RuntimeConfig
from stages.runtime.distributed import World
from stages.training.loop import train_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TESTS = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import toy_training as toy
from conf.runtime import RuntimeConfig
from stages.runtime.distributed import process_group
from stages.runtime.errors import Interrupted
from stages.training.loop import train_model

options = json.loads(sys.argv[2])
runtime = RuntimeConfig(device="cpu", threads=1, micro_batch=options["micro_batch"])
with process_group(runtime) as world:
    for name, output in options["outputs"].items():
        run = toy.training(name, toy.objective(name, **options["noise"]))
        if options["stop_rank"] == world.rank:
            toy.interrupt(run, options["stop_in"])
        try:
            train_model(run, Path(output), world, runtime)
        except Interrupted as stop:
            print(stop)
"""


WORLD = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Runner:
    """Trains 20 steps of toy models, or until a rank gets SIGTERM in a forward pass."""

    folder: Path

    def alone(self, run: str, name: str = "dpar", micro_batch: int | None = None, noise: float = 0.0) -> list[float]:
        """The losses of a run in this process."""
        module = objective(name, **({"dropout": noise, "class_dropout_prob": noise} if noise else {}))
        runtime = RuntimeConfig(device="cpu", micro_batch=micro_batch)
        train_model(training(name, module), self.folder / run, WORLD, runtime)
        return self.losses(run)

    def together(
        self,
        processes: int,
        outputs: dict[str, str],
        *,
        micro_batch: int | None = None,
        noise: float = 0.0,
        stop_in: int = 0,
        stop_rank: int | None = None,
    ) -> str:
        """Train each model in processes of torchrun. `outputs` has the run of each model. Returns what they print."""
        options = {
            "outputs": {name: str(self.folder / run) for name, run in outputs.items()},
            "micro_batch": micro_batch,
            "noise": {"dropout": noise, "class_dropout_prob": noise} if noise else {},
            "stop_in": stop_in,
            "stop_rank": stop_rank,
        }
        script = self.folder / "script.py"
        script.write_text(SCRIPT.format(tests=str(TESTS)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--log-dir={self.folder / 'logs'}", str(script), "_", json.dumps(options)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(stages.__file__).parents[1])}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def losses(self, run: str) -> list[float]:
        """Loss of each of the 20 steps."""
        lines = [json.loads(line) for line in (self.folder / run / "record/metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert list(found) == list(range(1, 21))
        return list(found.values())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Runner]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: sums depend on it in their last bits
    yield Runner(tmp_path)
    torch.set_num_threads(threads)


def test_two_processes_take_the_steps_of_one(run: Runner) -> None:
    names = ("dpar", "joint_head", "npp", "tokenizer")
    run.together(2, {name: f"{name}-two" for name in names})
    for name in names:
        assert run.losses(f"{name}-two") == pytest.approx(run.alone(f"{name}-one", name), rel=1e-6), name


def test_micro_batches_on_two_processes_take_the_undivided_steps(run: Runner) -> None:
    run.together(2, {"dpar": "divided"}, micro_batch=3)
    assert run.losses("divided") == pytest.approx(run.alone("one"), rel=1e-6)


def test_resuming_on_other_numbers_of_processes_changes_nothing(run: Runner) -> None:
    """From one to two and back, in micro-batches, with dropout: it depends on the place in the global batch alone."""
    noisy = {"micro_batch": 4, "noise": 0.3}
    whole = run.alone("one", **noisy)
    # Passes of a process: two a step on one, one a step on two, where the stop is agreed a step later.
    said = run.together(1, {"dpar": "many"}, **noisy, stop_in=11, stop_rank=0)
    assert "interrupted by SIGTERM after step 6 of 20" in said
    said = run.together(2, {"dpar": "many"}, **noisy, stop_in=5, stop_rank=1)
    assert said.count("interrupted by SIGTERM after step 13 of 20") == 2
    run.together(1, {"dpar": "many"}, **noisy)
    assert run.losses("many") == pytest.approx(whole, rel=1e-5)
    assert run.alone("without", micro_batch=4) != pytest.approx(whole, rel=1e-3)
