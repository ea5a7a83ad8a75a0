"""A small model and its adversary, trained in one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from conf.section import TrainingConfig
from stages.training.loop import Training
from stages.training.stream import Part

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
