"""A loss or gradient that is not finite stops the run at its own step, and names the images of its micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_training import IMAGES, batch, objective, training

from conf.runtime import RuntimeConfig
from stages.runtime.artifact import read_json
from stages.runtime.distributed import World
from stages.training.checkpoint import load_latest
from stages.training.finite import REPORT, FiniteWatch
from stages.training.loop import CHECKPOINTS, train_model
from stages.training.stream import Part

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)


class Poisoned(nn.Module):
    """Multiplies the loss of one batch, counted over all micro-batches, by a number."""

    def __init__(self, inner: nn.Module, at: int, factor: float) -> None:
        super().__init__()
        self.inner, self.at, self.factor, self.seen = inner, at, factor, 0
        self.model = inner.model

    def forward(self, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        loss, scalars = self.inner(batch)
        self.seen += 1
        return loss * self.factor if self.seen - 1 == self.at else loss, scalars


def run_poisoned(output: Path, at: int, factor: float, **changes: int) -> None:
    module = Poisoned(objective("llamagen"), at, factor)
    run = training("llamagen", module, **changes)
    train_model(run, output, WORLD, RuntimeConfig(device="cpu", micro_batch=2))


@pytest.mark.slow
def test_the_images_of_the_micro_batch_are_written_and_the_file_is_named(tmp_path: Path) -> None:
    # Four micro-batches a step: the 22nd is the third of the sixth step. It is read when the log is written.
    with pytest.raises(RuntimeError, match=r"^loss is not finite at step 6.*not_finite.json.*learning_rate"):
        run_poisoned(tmp_path, at=22, factor=float("nan"), log_every=10)
    assert read_json(tmp_path / REPORT) == {"step": 6, "what": "loss", "images": [5004, 5005]}


def test_a_gradient_that_overflows_names_the_whole_batch(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^gradient is not finite at step 3"):
        run_poisoned(tmp_path, at=8, factor=3e37)
    assert read_json(tmp_path / REPORT)["images"] == [2000 + place for place in range(IMAGES)]


def test_no_checkpoint_holds_what_came_after(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="at step 6"):
        run_poisoned(tmp_path, at=22, factor=float("inf"), log_every=20, checkpoint_every=4)
    state = load_latest(tmp_path / CHECKPOINTS, CPU)
    assert state is not None
    assert state["step"] == 4


def test_the_first_of_all_is_remembered(tmp_path: Path) -> None:
    watch = FiniteWatch(8, 4, WORLD)
    for step, number in ((0, 1.0), (3, float("nan")), (2, float("inf")), (5, float("nan"))):
        watch.see_loss(torch.tensor(number), step, Part(4, 4))
    with pytest.raises(RuntimeError, match="at step 3"):
        watch.require_finite(lambda step, part: {"images": [part.first, part.count]}, tmp_path)
    assert read_json(tmp_path / REPORT)["images"] == [4, 4]


def test_finite_numbers_pass_and_write_nothing(tmp_path: Path) -> None:
    watch = FiniteWatch(8, 4, WORLD)
    watch.see_loss(torch.tensor(3e38), 0, Part(0, 4))
    watch.see_gradient(torch.tensor(0.0), 0)
    watch.require_finite(lambda step, part: {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_toy_batches_depend_on_the_step() -> None:
    first, second = (batch("llamagen", step, Part(0, IMAGES)).tokens for step in (0, 1))
    assert not torch.equal(first, second)
