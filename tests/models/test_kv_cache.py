"""Cached steps against attention of the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention import causal_attention
from models.kv_cache import KVCache

LENGTH = 140  # some pages of the cache, and a part of one


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape), torch.randn(*shape), torch.randn(*shape)


def test_cached_steps_equal_the_whole_sequence_in_every_layer() -> None:
    layers = [qkv(3, LENGTH, 2, 8), tuple(x.flip(1) for x in qkv(3, LENGTH, 2, 8))]
    cache, slots = KVCache(num_layers=2, slots=4, capacity=LENGTH), torch.tensor([3, 0, 2])
    found: list[list[Tensor]] = [[], []]
    for t in range(LENGTH):
        for out, (q, k, v), attend in zip(found, layers, cache.step(slots, torch.full((3,), t)), strict=True):
            out.append(attend(q[:, t], k[:, t], v[:, t]))
    for out, (q, k, v) in zip(found, layers, strict=True):
        torch.testing.assert_close(torch.stack(out, dim=1), causal_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_a_slot_serves_sequence_after_sequence() -> None:
    cache, slot = KVCache(num_layers=1, slots=1, capacity=LENGTH), torch.tensor([0])
    for length in (LENGTH, 20, 70):
        q, k, v = (x.roll(length, dims=-1) for x in qkv(1, length, 2, 8))
        found = []
        for t in range(length):
            (attend,) = cache.step(slot, torch.tensor([t]))
            found.append(attend(q[:, t], k[:, t], v[:, t]))
        torch.testing.assert_close(torch.stack(found, dim=1), causal_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_the_bytes_of_a_cache_are_those_of_its_positions() -> None:
    cache = KVCache(num_layers=2, slots=5, capacity=70)
    assert cache.num_bytes == 0
    for attend in cache.step(torch.tensor([1]), torch.tensor([0])):
        attend(*torch.randn(3, 1, 2, 8))
    pages = 3 * 32  # positions of whole pages
    assert cache.num_bytes == 2 * pages * 5 * 2 * 8 * 4 * 2, "layers, positions, slots, heads, width, float32, k and v"


def reference(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention of one query (H, K) to concatenated keys and values, each (H, K)."""
    k, v = torch.stack(keys), torch.stack(values)  # (S, H, K)
    scores = torch.einsum("hk,shk->hs", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hs,shk->hk", scores.softmax(dim=-1), v)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    ahead=st.lists(st.integers(0, 68), min_size=1, max_size=5),
    steps=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True), min_size=1, max_size=14),
    seed=st.integers(0, 2**32),
)
def test_a_cache_holds_what_plain_concatenation_holds(
    heads: int, ahead: list[int], steps: list[list[int]], seed: int
) -> None:
    """Sequences first grow apart, up to the edge of a page at 64 and over it; then any of them grow together."""
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(num_layers=1, slots=5, capacity=68 + len(steps))
    keys: list[list[Tensor]] = [[] for _ in range(5)]
    values: list[list[Tensor]] = [[] for _ in range(5)]

    def grow(slots: list[int]) -> None:
        q, k, v = torch.randn(3, len(slots), heads, 8, generator=generator)
        (attend,) = cache.step(torch.tensor(slots), torch.tensor([len(keys[slot]) for slot in slots]))
        found = attend(q, k, v)
        for slot, query, key, value, attended in zip(slots, q, k, v, found, strict=True):
            keys[slot].append(key)
            values[slot].append(value)
            torch.testing.assert_close(attended, reference(query, keys[slot], values[slot]), atol=1e-5, rtol=1e-5)

    for slot, count in enumerate(ahead):
        for _ in range(count):
            grow([slot])
    for slots in steps:
        grow(slots)
