"""The average of weights: its definition, its exchange with the model's own, and what the loop makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from conf.runtime import RuntimeConfig
from conf.section import TrainingConfig
from stages.runtime.distributed import World
from stages.training.checkpoint import load_latest
from stages.training.ema import WeightAverage
from stages.training.loop import CHECKPOINTS, Training, train_model

WORLD = World(0, 1, torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu")


class Fit(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (self.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean(), {}


def training(ema_decay: float | None) -> tuple[nn.Linear, Training[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, Training(
        model=model,
        objective=Fit(model),
        batch=lambda step, part: torch.randn(8, 3, generator=torch.Generator().manual_seed(step)),
        data_state=lambda steps: {"samples_seen": steps},
        validate=lambda: {"bias": model.bias.item()},
        config=TrainingConfig(
            steps=30,
            global_batch_size=8,
            learning_rate=0.1,
            precision="float32",
            checkpoint_every=10,
            ema_decay=ema_decay,
        ),
        seed=0,
    )


def test_follows_its_definition() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = model[0].weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        average.update()
        expected = 0.9 * expected + 0.1 * model[0].weight.detach()
    torch.testing.assert_close(average.state_dict()["0.weight"], expected)
    assert set(average.state_dict()) == {"0.weight", "0.bias", "1.weight"}  # neither frozen weights nor buffers


def test_stands_in_for_the_weights_and_gives_them_back_bit_for_bit() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(3.0)
    average.update()
    own, mean = model.weight.detach().clone(), average.state_dict()["weight"].clone()
    with average.in_model():
        assert torch.equal(model.weight, mean)
    assert torch.equal(model.weight, own)
    assert torch.equal(average.state_dict()["weight"], mean)


def test_the_loop_scores_and_leaves_the_average_and_checkpoints_both(tmp_path: Path) -> None:
    last, run = training(None)
    train_model(run, tmp_path / "last", WORLD, RUNTIME)
    model, run = training(0.9)
    found = train_model(run, tmp_path / "mean", WORLD, RUNTIME)
    saved = load_latest(tmp_path / "mean" / CHECKPOINTS, WORLD.device)
    assert saved is not None
    assert torch.equal(saved["model"]["weights"]["bias"], last.bias)  # averaging changes nothing in training
    assert torch.equal(saved["average"]["bias"], model.bias)
    assert found == {"bias": model.bias.item()}
    assert not torch.equal(model.bias, last.bias)


def test_a_finished_run_that_is_started_again_leaves_the_average_too(tmp_path: Path) -> None:
    first, run = training(0.9)
    train_model(run, tmp_path, WORLD, RUNTIME)
    second, run = training(0.9)
    train_model(replace(run, batch=lambda step, part: torch.full((8, 3), torch.nan)), tmp_path, WORLD, RUNTIME)
    assert torch.equal(first.weight, second.weight)
