"""A step in micro-batches equals the undivided step; the largest micro-batch that fits is found and leaves no trace."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_training import IMAGES, OBJECTIVES, batch, objective, training

from conf.runtime import RuntimeConfig
from stages.runtime.distributed import World
from stages.runtime.errors import InputError
from stages.training import micro_batches
from stages.training.loop import train_model, train_step
from stages.training.micro_batches import check_micro_batch, largest_fitting, micro_batch, try_pass
from stages.training.state import TrainingState
from stages.training.stream import Part, divided

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)
SHARE = Part(0, IMAGES)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """The search collects garbage after each attempt, which takes long among all that other tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


def gradients(name: str, parts: list[Part], **changes: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a step by weight, as its optimiser would get them, and its scalars."""
    module = objective(name, **changes).train()
    run = training(name, module)
    state = TrainingState(run.model, run.auxiliary, run.config)
    kept: dict[str, Tensor] = {}

    def keep(rate: float) -> dict[str, Tensor]:
        kept.update({key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None})
        return {}

    state.step = keep  # type: ignore[method-assign]
    batches = [(part, batch(name, 3, part)) for part in parts]
    scalars = train_step(run, module, state, batches, 3, WORLD)
    return kept, scalars


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the norm of the first."""
    assert one.keys() == other.keys()
    assert len(one) > 3
    vectors = [torch.cat([gradients[name].flatten() for name in one]).double() for gradients in (one, other)]
    return float((vectors[0] - vectors[1]).norm() / vectors[0].norm())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "adversary"])
def test_losses_and_gradients_are_those_of_the_undivided_step(name: str, size: int) -> None:
    whole, scalars = gradients(name, [SHARE])
    parts = divided(SHARE, size)
    assert len({part.count for part in parts}) == (1 if size == 2 else 2)
    found, found_scalars = gradients(name, parts)
    assert difference(whole, found) < 1e-6
    assert scalars.keys() == found_scalars.keys()
    for key in scalars.keys() - {"codebook_usage"}:
        assert float(found_scalars[key]) == pytest.approx(float(scalars[key]), rel=1e-6, abs=1e-8), key


def test_batches_of_patches_are_ragged_in_these_tests() -> None:
    counts = {len(batch("dpar", 3, part).patches.first) for part in divided(SHARE, 2)}
    assert len(counts) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_the_discriminator_sees_a_micro_batch_as_it_would_the_batch_of_a_process() -> None:
    """Its BatchNorm has the statistics of a micro-batch: gradients are the mean over as many processes."""
    parts = divided(SHARE, 4)
    found, _ = gradients("adversary", parts)
    alone = [gradients("adversary", [part])[0] for part in parts]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in found}
    assert difference(found, mean) < 1e-6
    assert difference(found, gradients("adversary", [SHARE])[0]) > 1e-4


def test_dropout_depends_on_the_place_in_the_global_batch_and_not_on_what_came_before() -> None:
    parts = divided(SHARE, 4)
    noisy = {"dropout": 0.3, "class_dropout_prob": 0.5}
    found, _ = gradients("dpar", parts, **noisy)
    alone = [gradients("dpar", [part], **noisy)[0] for part in parts]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in found}
    assert difference(found, mean) < 1e-6
    assert difference(found, gradients("dpar", parts)[0]) > 1e-3
    same_images = [(Part(first, 4), batch("dpar", 3, parts[0])) for first in (0, 4)]
    module = objective("dpar", **noisy).train()
    losses = []
    for each in same_images:
        run = training("dpar", module)
        state = TrainingState(run.model, run.auxiliary, run.config.model_copy(update={"learning_rate": 1e-12}))
        losses.append(float(train_step(run, module, state, [each], 3, WORLD)["loss"]))
    assert losses[0] != losses[1]


def out_of_memory_above(limit: int, tried: list[int]) -> object:
    def attempt(images: int) -> None:
        tried.append(images)
        if images > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    return attempt


@pytest.mark.parametrize(
    ("count", "limit", "tried"), [(16, 16, [16]), (16, 5, [16, 8, 4]), (7, 1, [7, 4, 2, 1]), (12, 4, [12, 6, 3])]
)
def test_the_search_halves_until_a_step_fits(count: int, limit: int, tried: list[int]) -> None:
    seen: list[int] = []
    assert largest_fitting(count, out_of_memory_above(limit, seen)) == tried[-1]  # type: ignore[arg-type]
    assert seen == tried


def test_a_model_that_does_not_fit_at_all_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match=r"one image needs more memory.*runtime.checkpoint_activations=true"):
        largest_fitting(4, out_of_memory_above(0, []))  # type: ignore[arg-type]


def test_other_errors_of_an_attempt_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(images: int) -> None:
        raise RuntimeError("tokens are (4, 3)")

    with pytest.raises(RuntimeError, match="tokens are"):
        largest_fitting(4, broken)


def test_only_a_gpu_is_searched_and_a_resumed_run_starts_where_it_was() -> None:
    tried: list[int] = []
    attempt = out_of_memory_above(4, tried)
    assert micro_batch(None, None, SHARE, attempt, WORLD) == IMAGES  # type: ignore[arg-type]
    assert micro_batch(2, None, SHARE, attempt, WORLD) == 2  # type: ignore[arg-type]
    assert tried == []
    on_gpu = World(0, 1, torch.device("cuda", 0))
    assert micro_batch(None, None, SHARE, attempt, on_gpu) == 4  # type: ignore[arg-type]
    assert micro_batch(None, 2, SHARE, attempt, on_gpu) == 2  # type: ignore[arg-type]
    assert tried == [8, 4, 2]


class HungryNet(nn.Module):
    """Runs out of memory in the backward pass of more than three images, and changes a buffer in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        made = self.model(inputs)
        if len(inputs) > 3:
            made.register_hook(self._fail)
        return made.square().mean(), {}

    @staticmethod
    def _fail(gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_attempt_leaves_weights_buffers_and_gradients_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = HungryNet().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    held: list[int] = []
    monkeypatch.setattr(micro_batches, "ballast", lambda device, unmade: held.append(unmade))
    assert largest_fitting(8, lambda images: try_pass(net, torch.randn(images, 4), CPU, 160)) == 2
    assert held == [160] * 3
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_memory_of_an_optimiser_counts_until_its_first_step() -> None:
    module = objective("joint_head")
    run = training("joint_head", module)
    state = TrainingState(run.model, run.auxiliary, run.config)
    assert state.unmade_bytes == sum(2 * parameter.nbytes for parameter in module.parameters())
    train_step(run, module.train(), state, [(SHARE, batch("joint_head", 0, SHARE))], 0, WORLD)
    assert state.unmade_bytes == 0


def test_a_micro_batch_larger_than_the_share_is_refused_before_the_first_step(tmp_path: Path) -> None:
    check_micro_batch(8, SHARE)
    with pytest.raises(InputError, match=r"runtime.micro_batch is 9, expected at most 8"):
        check_micro_batch(9, SHARE)
    run = training("llamagen", objective("llamagen"))
    with pytest.raises(InputError, match=r"runtime.micro_batch is 9"):
        train_model(run, tmp_path, WORLD, RuntimeConfig(device="cpu", micro_batch=9))
    assert list(tmp_path.iterdir()) == []


def test_a_later_lack_of_memory_names_a_smaller_micro_batch(tmp_path: Path) -> None:
    module = objective("llamagen")
    inner, passes = module.forward, []

    def forward(given: object) -> tuple[Tensor, dict[str, Tensor]]:
        passes.append(given)
        if len(passes) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(given)

    module.forward = forward
    with pytest.raises(RuntimeError, match=r"in step 3 with micro-batches of 4 images: set runtime.micro_batch=2 or"):
        train_model(training("llamagen", module), tmp_path, WORLD, RuntimeConfig(device="cpu", micro_batch=4))
