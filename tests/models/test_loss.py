"""Cross-entropy from features: equal to the plain one in value and gradients, and far smaller."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.loss import head_cross_entropy

N, D, V = 37, 12, 50


def inputs(targets_per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    return features, weight, torch.randint(V, (N, targets_per_row), generator=generator)


def plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits repeated for each target of a row."""
    logits = (features @ weight.T).float()[:, None].expand(-1, targets.shape[1], -1)
    return F.cross_entropy(logits.reshape(-1, V), targets.flatten())


@pytest.mark.parametrize("targets_per_row", [1, 4])
def test_value_and_gradients_are_those_of_the_plain_cross_entropy(targets_per_row: int) -> None:
    features, weight, targets = inputs(targets_per_row)
    targets[0] = targets[0, 0]  # the same class several times in a row
    expected = plain(features, weight, targets)
    wanted = torch.autograd.grad(3 * expected, (features, weight))
    found = head_cross_entropy(features, weight, targets)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(torch.autograd.grad(3 * found, (features, weight)), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_nothing_is_written_into_what_was_given() -> None:
    features, weight, targets = inputs(1)
    before = [features.detach().clone(), weight.detach().clone()]
    head_cross_entropy(features, weight, targets).backward()
    assert torch.equal(features, before[0])
    assert torch.equal(weight, before[1])


def test_without_gradients_the_value_is_the_same() -> None:
    features, weight, targets = inputs(1)
    with torch.no_grad():
        assert torch.equal(head_cross_entropy(features, weight, targets), head_cross_entropy(*inputs(1)).detach())


def test_under_autocast_products_are_bfloat16_and_the_softmax_is_float32() -> None:
    features, weight, targets = inputs(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_cross_entropy(features, weight, targets)
        expected = plain(features, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward()
    wanted = torch.autograd.grad(expected, (features, weight))
    for gradient, other in zip((features.grad, weight.grad), wanted, strict=True):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=2e-3)


def test_logits_beyond_the_reach_of_exp_are_fine() -> None:
    features, weight, targets = inputs(1)
    loss = head_cross_entropy(features * 1000, weight, targets)
    loss.backward()
    assert math.isfinite(loss.item())
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_holds_the_logits_once_at_most(precision: str) -> None:
    """Memory of a process, in float32 copies of the logits: one, and slices. The plain cross-entropy takes three."""
    script = f"""
import torch
from models.loss import head_cross_entropy
N, D, V = 2048, 16, 16384
features, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
targets = torch.randint(V, (N, 1))
def peak():  # not of getrusage, which counts the memory of the process that started this one
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
def step(rows):
    with torch.autocast("cpu", torch.bfloat16, enabled={precision == "bfloat16"}):
        head_cross_entropy(features[:rows], weight, targets[:rows]).backward()
step(64)  # whatever is loaded and allocated once
before = peak()
step(N)
print((peak() - before) / (4 * N * V))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < 1.8, "a second copy would make two and some slices"
