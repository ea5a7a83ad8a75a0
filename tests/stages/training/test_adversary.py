"""A model and its adversary in one loop: as trained in turn, and bit for bit after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from toy_game import Batch, Game, batch, different, hinge, training

from conf.runtime import RuntimeConfig
from stages.runtime.distributed import World
from stages.training.checkpoint import load_latest
from stages.training.loop import CHECKPOINTS, train_model
from stages.training.stream import Part

WORLD = World(0, 1, torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu")


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


@pytest.mark.slow
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
