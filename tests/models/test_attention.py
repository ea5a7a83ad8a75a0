"""Packed attention against a dense softmax under xformers' own mask."""

from __future__ import annotations

import pytest
import torch

from models.attention import causal_attention, packed_causal_attention

CPU = torch.device("cpu")


def qkv(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape), torch.randn(*shape), torch.randn(*shape)


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [4, 4, 4], [1, 1]])
@pytest.mark.filterwarnings("ignore")  # xformers warns about extensions that are not built
def test_packed_attention_equals_a_dense_softmax_under_the_block_diagonal_mask(lengths: list[int]) -> None:
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    total = sum(lengths)
    q, k, v = qkv(total, 2, 8)
    bias = BlockDiagonalCausalMask.from_seqlens(lengths).materialize((1, 1, total, total))[0, 0]
    scores = torch.einsum("qhk,phk->hqp", q, k) / 8**0.5 + bias
    expected = torch.einsum("hqp,phk->qhk", scores.softmax(dim=-1), v)
    torch.testing.assert_close(packed_causal_attention(lengths, CPU)(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_attention_on_the_cpu_stays_near_float32_in_values_and_gradients() -> None:
    exact = [x.requires_grad_() for x in qkv(3, 20, 2, 16)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    weights = torch.randn(3, 20, 2, 16)
    found, expected = causal_attention(*rounded), causal_attention(*exact)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
    (found.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(rounded, exact, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: xformers attends there only")
def test_xformers_agrees_with_the_cpu() -> None:
    lengths = [1, 7, 30]
    q, k, v = qkv(sum(lengths), 2, 16)
    device = torch.device("cuda")
    found = packed_causal_attention(lengths, device)(*(x.to(device, torch.bfloat16) for x in (q, k, v)))
    expected = packed_causal_attention(lengths, CPU)(q, k, v)
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)
