"""Packed attention against a dense softmax under xformers' own mask, and cached steps against the whole."""

from __future__ import annotations

import pytest
import torch

from models.attention import causal_attention, packed_causal_attention
from models.kv_cache import KVCache

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


LENGTH = 70  # more than two blocks of the cache


def test_cached_steps_equal_the_whole_sequence_in_every_layer() -> None:
    layers = [qkv(3, LENGTH, 2, 8), tuple(x.flip(1) for x in qkv(3, LENGTH, 2, 8))]
    cache = KVCache(num_layers=2, capacity=LENGTH)
    found: list[list[torch.Tensor]] = [[], []]
    for t in range(LENGTH):
        for out, (q, k, v), attend in zip(found, layers, cache.step(t), strict=True):
            out.append(attend(q[:, t], k[:, t], v[:, t]))
    for out, (q, k, v) in zip(found, layers, strict=True):
        torch.testing.assert_close(torch.stack(out, dim=1), causal_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_ragged_steps_advance_only_their_rows() -> None:
    q, k, v = qkv(3, LENGTH, 2, 8)
    whole = causal_attention(q, k, v)
    cache, counts = KVCache(num_layers=1, capacity=LENGTH), torch.zeros(3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    while int(counts.min()) < LENGTH:
        rows = torch.nonzero((torch.rand(3, generator=generator) < 0.6) & (counts < LENGTH))[:, 0]
        if len(rows):
            places = counts[rows]
            (attend,) = cache.ragged_step(rows, counts.clamp(max=LENGTH - 1))
            found = attend(q[rows, places], k[rows, places], v[rows, places])
            torch.testing.assert_close(found, whole[rows, places], atol=1e-5, rtol=1e-5)
            counts[rows] += 1


def test_a_cache_takes_its_capacity_and_no_position_more() -> None:
    q, k, v = qkv(3, 40, 2, 8)
    cache = KVCache(num_layers=1, capacity=40)
    for t in range(40):
        (attend,) = cache.step(t)
        attend(q[:, t], k[:, t], v[:, t])
    assert cache.num_bytes == 2 * k.nbytes
    with pytest.raises(ValueError, match="position 40 of a cache for 40 positions"):
        next(cache.step(40))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: xformers attends there only")
def test_xformers_agrees_with_the_cpu() -> None:
    lengths = [1, 7, 30]
    q, k, v = qkv(sum(lengths), 2, 16)
    device = torch.device("cuda")
    found = packed_causal_attention(lengths, device)(*(x.to(device, torch.bfloat16) for x in (q, k, v)))
    expected = packed_causal_attention(lengths, CPU)(q, k, v)
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)
