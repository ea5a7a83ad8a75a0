"""Packed attention on a CUDA device: every backend that has an operator, with gradients, against the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.attention import Backend, backend_refusal, packed_causal_attention, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [1, 7, 141, 30]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def _automatic_choice() -> Iterator[None]:
    yield
    use_backend("auto", CUDA)


def attended(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """Output, and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(LENGTHS), 4, head_dim, generator=generator) for _ in range(4)]
    leaves = [row.to(device, dtype).requires_grad_() for row in rows[:3]]
    out = packed_causal_attention(LENGTHS, device, head_dim)(*leaves)
    (out.float() * rows[3].to(device)).sum().backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == 3
    return [out.detach(), *gradients]


@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["xformers", "varlen", "padded"])
def test_a_backend_agrees_with_the_cpu(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    if refusal := backend_refusal(backend, CUDA, dtype, head_dim):
        pytest.skip(refusal)
    use_backend(backend, CUDA)
    found, expected = attended(CUDA, dtype, head_dim), attended(CPU, torch.float32, head_dim)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float().cpu(), other, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_automatic_choice_attends_in_every_dtype_and_width(dtype: torch.dtype, head_dim: int) -> None:
    found, expected = attended(CUDA, dtype, head_dim), attended(CPU, torch.float32, head_dim)
    torch.testing.assert_close(found[0].float().cpu(), expected[0], atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
