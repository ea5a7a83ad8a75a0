"""Activation checkpointing: gradients equal to the bit, dropout included, with less kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_training import IMAGES, batch, objective, training

from conf.runtime import RuntimeConfig
from stages.runtime.distributed import World
from stages.training.loop import train_model
from stages.training.recomputed import recompute_blocks
from stages.training.stream import Part

WORLD = World(0, 1, torch.device("cpu"))
NAMES = ("llamagen", "npp", "dpar", "joint_head", "tokenizer")


def step(module: nn.Module, name: str, *, bfloat16: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of a step, and the bytes that its forward pass keeps."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(7)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss, _ = module.train()(batch(name, 0, Part(0, IMAGES)))
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}, kept


def assert_equal_steps(name: str, change: Callable[[nn.Module], None], *, bfloat16: bool) -> tuple[int, int]:
    noisy = {} if name == "tokenizer" else {"dropout": 0.3, "class_dropout_prob": 0.5}
    plain, changed = objective(name, **noisy), objective(name, **noisy)
    change(changed)
    assert list(changed.state_dict()) == list(plain.state_dict())
    loss, gradients, kept = step(plain, name, bfloat16=bfloat16)
    found_loss, found, found_kept = step(changed, name, bfloat16=bfloat16)
    assert torch.equal(found_loss, loss)
    assert len(gradients) > 3
    assert found.keys() == gradients.keys()
    assert [key for key in gradients if not torch.equal(found[key], gradients[key])] == []
    return kept, found_kept


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_equal_to_the_bit_and_less_is_kept(name: str) -> None:
    kept, found_kept = assert_equal_steps(name, recompute_blocks, bfloat16=False)
    assert found_kept < 0.7 * kept


def test_they_are_equal_under_autocast_too() -> None:
    assert_equal_steps("dpar", recompute_blocks, bfloat16=True)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_the_setting_changes_no_weight_of_a_run(tmp_path: Path) -> None:
    weights = []
    for setting in (False, True):
        module = objective("dpar", dropout=0.3)
        runtime = RuntimeConfig(device="cpu", checkpoint_activations=setting)
        train_model(training("dpar", module), tmp_path / str(setting), WORLD, runtime)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
