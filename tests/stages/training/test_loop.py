"""The loop: learns, resumes bit for bit after a kill, agrees over processes, refuses a loss that is no number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.runtime import RuntimeConfig
from conf.section import TrainingConfig
from stages.runtime.distributed import World
from stages.runtime.errors import ArtifactError
from stages.training.checkpoint import load_latest
from stages.training.loop import CHECKPOINTS, Training, train_model
from stages.training.meter import MEASURED
from stages.training.optim import learning_rate, make_optimizer
from stages.training.stream import Part

WORLD = World(0, 1, torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu")
LONG = {"steps": 200, "checkpoint_every": 10}


class Regression(nn.Module):
    """A small net with dropout, so that resuming needs the random numbers right."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = batch
        loss = (self.model(inputs) - targets).square().mean()
        return loss, {"error": loss.detach().sqrt()}


def batch(step: int, part: Part) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    inputs = inputs[part.first : part.first + part.count]
    return inputs, inputs.sum(dim=1, keepdim=True)


def training(make_batch: Callable[[int, Part], Any] = batch, **changes: Any) -> Training[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
    config = TrainingConfig(
        **{"steps": 60, "global_batch_size": 16, "learning_rate": 0.01, "precision": "float32"}
        | {"checkpoint_every": 20, "log_every": 10}
        | changes
    )
    return Training(
        model=model,
        objective=Regression(model),
        batch=make_batch,
        data_state=lambda steps: {"seed": 5, "samples_seen": 16 * steps, "tokens": "t" * 64},
        validate=lambda: {"heldout_loss": 1.0},
        config=config,
        seed=5,
    )


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "record/metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_is_logged(tmp_path: Path) -> None:
    assert train_model(training(), tmp_path, WORLD, RUNTIME) == {"heldout_loss": 1.0}
    losses = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    assert list(losses) == [10, 20, 30, 40, 50, 60]
    assert losses[60] < 0.5 * losses[10]
    assert [line["step"] for line in lines(tmp_path) if "heldout_loss" in line] == [20, 40, 60]


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = training()
    train_model(whole, tmp_path / "whole", WORLD, RUNTIME)

    def breaks(step: int, part: Part) -> tuple[Tensor, Tensor]:
        if step == 47:
            raise KeyboardInterrupt
        return batch(step, part)

    with pytest.raises(KeyboardInterrupt):
        train_model(training(breaks), tmp_path / "broken", WORLD, RUNTIME)
    assert lines(tmp_path / "broken")[-1]["step"] == 40
    resumed = training()
    train_model(resumed, tmp_path / "broken", WORLD, RUNTIME)
    for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    kept = [
        [{name: value for name, value in line.items() if name not in MEASURED} for line in lines(tmp_path / run)]
        for run in ("whole", "broken")
    ]
    assert kept[0] == kept[1]


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    train_model(training(steps=20), tmp_path, WORLD, RUNTIME)
    for name, value, said in (("tokens", "s" * 64, "tokens t+, expected s+"), ("seed", 6, "seed 5, expected 6")):
        other = training(steps=40)
        state = other.data_state
        other = replace(other, data_state=lambda steps, state=state, change={name: value}: state(steps) | change)
        with pytest.raises(ArtifactError, match=f"were trained with {said}: they belong to other data"):
            train_model(other, tmp_path, WORLD, RUNTIME)


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_try(tmp_path: Path) -> None:
    def poisoned(step: int, part: Part) -> tuple[Tensor, Tensor]:
        inputs, targets = batch(step, part)
        return inputs, targets * float("nan") if step >= 25 else targets

    with pytest.raises(RuntimeError, match=r"loss is not finite at step 26.*learning_rate"):
        train_model(training(poisoned), tmp_path, WORLD, RUNTIME)
    state = load_latest(tmp_path / CHECKPOINTS, WORLD.device)
    assert state is not None
    assert state["step"] == 20


@pytest.mark.slow
def test_sigkill_at_any_point_leaves_a_run_that_ends_the_same(tmp_path: Path) -> None:
    """A real process is killed twice at unplanned points; this one finishes what it began."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import test_loop as t
            def slow(step, part):
                time.sleep(0.01)
                return t.batch(step, part)
            t.train_model(t.training(slow, **t.LONG), Path(sys.argv[1]), t.WORLD, t.RUNTIME)
            """
        )
    )
    killed = tmp_path / "killed"
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it in their last bits
    for number in (2, 6):
        process = subprocess.Popen([sys.executable, str(script), str(killed)], env=env)
        before = set((killed / CHECKPOINTS).glob("step-*.pt"))
        while process.poll() is None and len(set((killed / CHECKPOINTS).glob("step-*.pt")) - before) < 2:
            time.sleep(0.01)
        time.sleep(0.02 * number)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must be killed before its end"
    resumed, whole = training(**LONG), training(**LONG)
    train_model(resumed, killed, WORLD, RUNTIME)
    train_model(whole, tmp_path / "whole", WORLD, RUNTIME)
    for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_learning_rate_warms_up_then_follows_its_decay() -> None:
    cosine = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, decay="cosine")
    assert learning_rate(0, cosine) == pytest.approx(0.1)
    assert learning_rate(9, cosine) == pytest.approx(1.0)
    assert learning_rate(55, cosine) == pytest.approx(0.5)
    assert learning_rate(99, cosine) < 0.001
    constant = TrainingConfig(steps=100, learning_rate=1e-4)
    assert {learning_rate(step, constant) for step in (0, 50, 99)} == {1e-4}


def test_npps_learning_rate_begins_anew_in_each_level_and_falls_in_its_last_fifth() -> None:
    config = TrainingConfig(steps=300, warmup_steps=1, learning_rate=1.0, decay="linear_tail")  # a step an epoch

    def published(epoch: float, last: int) -> float:
        """The factor as the paper's schedule has it, by epochs of a segment."""
        return min(1.0, epoch, 1.0 - 0.9 * (epoch - 0.8 * last) / (0.2 * last))

    for step in range(300):
        assert learning_rate(step, config, (150,)) == pytest.approx(published(step % 150, 150), abs=1e-9)
    assert learning_rate(149, config, (150,)) == pytest.approx(0.13)
    assert learning_rate(150, config, (150,)) == 0.0
    slow = TrainingConfig(steps=300, warmup_steps=10, learning_rate=1.0, decay="linear_tail")
    for first in (0, 75, 150):
        assert [learning_rate(first + n, slow, (75, 150)) for n in range(10)] == [n / 10 for n in range(10)]


def test_every_decay_begins_anew_where_it_is_told_to() -> None:
    for decay in ("constant", "cosine", "linear_tail"):
        config = TrainingConfig(steps=40, warmup_steps=3, decay=decay)
        half = TrainingConfig(steps=20, warmup_steps=3, decay=decay)
        expected = [learning_rate(step, half) for step in range(20)]
        assert [learning_rate(step, config, (20,)) for step in range(40)] == expected * 2


def test_a_tail_after_a_long_warmup_starts_where_the_warmup_ends() -> None:
    config = TrainingConfig(steps=10, warmup_steps=9, learning_rate=1.0, decay="linear_tail")
    assert [learning_rate(step, config) for step in (8, 9)] == [pytest.approx(8 / 9), 1.0]


def test_weight_decay_spares_norms_and_biases() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, spared = make_optimizer(model, TrainingConfig(steps=1)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 2]
    assert decayed["weight_decay"] == 0.05
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert spared["weight_decay"] == 0.0
