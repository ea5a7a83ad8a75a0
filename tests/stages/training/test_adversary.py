"""A model and its adversary in one loop: as trained in turn, bit for bit after a kill, and over processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import stages
from conf.runtime import RuntimeConfig
from conf.section import TrainingConfig
from stages.runtime.distributed import World
from stages.training.checkpoint import load_latest
from stages.training.loop import CHECKPOINTS, Training, train_model
from stages.training.stream import Part

WORLD = World(0, 1, torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu")
Batch = tuple[Tensor, Tensor]


class Game(nn.Module):
    """A small net is to map inputs to targets; another is to tell what it makes from targets."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
        self.judge = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = batch
        made = self.maker(inputs)
        frozen = {name: weight.detach() for name, weight in self.judge.named_parameters()}
        fooling = -functional_call(self.judge, frozen, (made,)).mean()
        telling = hinge(self.judge(targets), self.judge(made.detach()))
        return (made - targets).square().mean() + 0.5 * fooling + 0.5 * telling, {"telling": telling.detach()}


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def batch(step: int, part: Part) -> Batch:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return inputs, inputs.flip(1)


def training(make_batch: Callable[[int, Part], Batch] = batch, **changes: Any) -> tuple[Game, Training[Batch]]:
    torch.manual_seed(0)
    game = Game()
    config = TrainingConfig(
        **{"steps": 40, "global_batch_size": 16, "learning_rate": 0.01, "precision": "float32", "weight_decay": 0.0}
        | {"checkpoint_every": 10, "log_every": 10}
        | changes
    )
    return game, Training(
        model=game.maker,
        objective=game,
        batch=make_batch,
        data_state=lambda steps: {"samples_seen": steps},
        validate=dict[str, float],
        config=config,
        seed=5,
        auxiliary={"judge": game.judge},
    )


def different(one: nn.Module, other: nn.Module) -> list[str]:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [name for (name, tensor), expected in pairs if not torch.equal(tensor, expected)]


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def train_in_turn(game: Game) -> None:
    """The usual order: the maker's step, then the judge's on what was made before it."""
    adams = [torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.95)) for net in (game.maker, game.judge)]
    for step in range(40):
        inputs, targets = batch(step, Part(0, 16))
        made = game.maker(inputs)
        adams[0].zero_grad()
        ((made - targets).square().mean() - 0.5 * game.judge(made).mean()).backward()
        nn.utils.clip_grad_norm_(game.maker.parameters(), 1.0)
        adams[0].step()
        adams[1].zero_grad()
        (0.5 * hinge(game.judge(targets), game.judge(made.detach()))).backward()
        nn.utils.clip_grad_norm_(game.judge.parameters(), 1.0)
        adams[1].step()


def test_one_backward_pass_equals_training_in_turn(tmp_path: Path) -> None:
    together, run = training()
    train_model(run, tmp_path, WORLD, RUNTIME)
    in_turn, _ = training()
    train_in_turn(in_turn)
    # A bias in front of a BatchNorm has no gradient but noise, which Adam makes steps of.
    for game in (together, in_turn):
        game.judge.get_parameter("0.bias").data.zero_()
        game.judge.get_buffer("1.running_mean").zero_()
    assert_close(together, in_turn)
    assert different(together, training()[0]) != []


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_killed_run_ends_the_same_bit_for_bit(tmp_path: Path, ema_decay: float | None) -> None:
    whole, run = training(ema_decay=ema_decay)
    train_model(run, tmp_path / "whole", WORLD, RUNTIME)

    def breaks(step: int, part: Part) -> Batch:
        if step == 27:
            raise KeyboardInterrupt
        return batch(step, part)

    with pytest.raises(KeyboardInterrupt):
        train_model(training(breaks, ema_decay=ema_decay)[1], tmp_path / "broken", WORLD, RUNTIME)
    resumed, run = training(ema_decay=ema_decay)
    train_model(run, tmp_path / "broken", WORLD, RUNTIME)
    assert different(whole, resumed) == []
    assert int(resumed.judge.get_buffer("1.num_batches_tracked")) == 3 * 40
    saved = [load_latest(tmp_path / name / CHECKPOINTS, WORLD.device) for name in ("whole", "broken")]
    moments = [state["judge"]["optimizer"]["state"] for state in saved if state is not None]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


@pytest.mark.slow
def test_two_processes_with_the_same_samples_train_as_one(tmp_path: Path) -> None:
    """Their gradients are equal, so is the mean; and BatchNorm, which sees a process's own batch, sees the same one."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import test_adversary as t
            from conf.runtime import RuntimeConfig
            from stages.runtime.distributed import process_group
            with process_group(RuntimeConfig(device="cpu", threads=1)) as world:
                game, run = t.training()
                t.train_model(run, Path(sys.argv[1]), world, t.RUNTIME)
                t.torch.save(game.state_dict(), f"{{sys.argv[1]}}/{{world.rank}}.pt")
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={tmp_path / 'logs'}", str(script), str(tmp_path / "two")]
    code = str(Path(stages.__file__).parents[1])
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": code})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it in their last bits
    try:
        one, run = training()
        train_model(run, tmp_path / "one", WORLD, RUNTIME)
    finally:
        torch.set_num_threads(threads)
    for rank in (0, 1):
        other, _ = training()
        other.load_state_dict(torch.load(tmp_path / f"two/{rank}.pt", weights_only=True))
        assert different(one, other) == []
