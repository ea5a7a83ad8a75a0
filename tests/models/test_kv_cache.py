"""Cached steps against attention of the whole sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import kv_cache
from models.attention import causal_attention
from models.kv_cache import KVCache
from models.layers import Attend


@pytest.fixture(params=["weighted rows", "matrix products"], autouse=True)
def _products_of_either_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every property holds for what CPUs do and for what other devices do, here on the CPU."""
    if request.param == "matrix products":
        monkeypatch.setattr(kv_cache, "_score_rows", kv_cache._score_products)
        monkeypatch.setattr(kv_cache, "_mix_rows", kv_cache._mix_products)


def qkv(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape), torch.randn(*shape), torch.randn(*shape)


LENGTH = 140  # more than two blocks of the cache


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


def test_a_cache_takes_blocks_as_it_grows_to_its_capacity_and_no_position_more() -> None:
    q, k, v = qkv(3, 70, 2, 8)
    cache = KVCache(num_layers=1, capacity=70)
    for t in range(70):
        (attend,) = cache.step(t)
        attend(q[:, t], k[:, t], v[:, t])
        assert cache.num_bytes == 2 * k[:, 0].nbytes * (64 if t < 64 else 128)
    with pytest.raises(ValueError, match=r"position is 70, expected 0\.\.69: the cache holds 70 positions"):
        next(cache.step(70))


def reference(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Attention of one query (H, K) to concatenated keys and values, each (H, K)."""
    k, v = torch.stack(keys), torch.stack(values)  # (S, H, K)
    scores = torch.einsum("hk,shk->hs", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hs,shk->hk", scores.softmax(dim=-1), v)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    together=st.integers(56, 66),
    subsets=st.lists(st.integers(1, 15), min_size=1, max_size=14),
    spare=st.integers(0, 70),
    seed=st.integers(0, 2**32),
)
def test_a_cache_holds_what_plain_concatenation_holds(
    batch: int, heads: int, together: int, subsets: list[int], spare: int, seed: int
) -> None:
    """All sequences grow together up to the edge of a block at 64, then subsets of them, given by their bits."""
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(num_layers=1, capacity=together + len(subsets) + spare)
    keys: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    values: list[list[torch.Tensor]] = [[] for _ in range(batch)]

    def grow(rows: list[int], attend: Attend) -> None:
        q, k, v = torch.randn(3, len(rows), heads, 8, generator=generator)
        found = attend(q, k, v)
        for row, query, key, value, attended in zip(rows, q, k, v, found, strict=True):
            keys[row].append(key)
            values[row].append(value)
            if len(keys[row]) > together - 2:
                torch.testing.assert_close(attended, reference(query, keys[row], values[row]), atol=1e-5, rtol=1e-5)

    for position in range(together):
        grow(list(range(batch)), *cache.step(position))
    for bits in subsets:
        rows = [row for row in range(batch) if bits >> row & 1]
        others = [row for row in range(batch) if row not in rows]
        if not rows:
            continue
        layer = cache._layers[0]
        assert layer is not None
        before = layer.keys[:, others].clone(), layer.values[others].clone()
        used = layer.used
        grow(rows, *cache.ragged_step(torch.tensor(rows), torch.tensor([len(row) for row in keys])))
        assert torch.equal(layer.keys[:used, others], before[0][:used]), "rows that did not advance are untouched"
        assert torch.equal(layer.values[others, :, : used * 64], before[1][:, :, : used * 64])
    layer = cache._layers[0]
    assert layer is not None
    for row in range(batch):
        held = layer.keys[:, row].permute(0, 3, 1, 2).flatten(0, 1)[: len(keys[row])]  # (S, H, K)
        assert torch.equal(held, torch.stack(keys[row]))
        assert torch.equal(layer.values[row].transpose(0, 1)[: len(values[row])], torch.stack(values[row]))
    blocks = math.ceil(max(map(len, keys)) / 64)
    assert cache.num_bytes == blocks * 64 * batch * heads * 8 * 4 * 2, (
        "positions, sequences, heads, width, float32, k+v"
    )


def test_bfloat16_steps_stay_near_float32() -> None:
    q, k, v = qkv(2, LENGTH, 2, 16)
    expected = causal_attention(q, k, v)
    cache = KVCache(num_layers=1, capacity=LENGTH)
    for t in range(LENGTH):
        (attend,) = cache.step(t)
        found = attend(*(x[:, t].bfloat16() for x in (q, k, v)))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected[:, t], atol=3e-2, rtol=3e-2)


def test_a_step_after_sampling_can_be_differentiated() -> None:
    """What steps keep for each other must not be inference tensors."""
    q, k, v = qkv(1, 2, 2, 8)
    with torch.inference_mode():
        (attend,) = KVCache(num_layers=1, capacity=2).step(0)
        attend(q[:, 0], k[:, 0], v[:, 0])
    query = q[:, 0].clone().requires_grad_()
    (attend,) = KVCache(num_layers=1, capacity=2).step(0)
    attend(query, k[:, 0], v[:, 0]).sum().backward()
    assert query.grad is not None
