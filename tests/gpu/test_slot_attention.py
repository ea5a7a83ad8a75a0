"""Slot attention on a CUDA device: the compiled kernel against plain torch, alone and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.slot_attention import kernel_refusal, slot_attention, slot_attention_plain, store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SLOTS, HEADS, CAPACITY, ROWS = 9, 3, 257, 6
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def cache(dtype: torch.dtype, width: int, longest: int) -> list[Tensor]:
    """Keys and values; positions from `longest` on are NaN."""
    torch.manual_seed(0)
    made = [torch.randn(SLOTS, HEADS, CAPACITY, width, device=CUDA, dtype=dtype) for _ in range(2)]
    for tensor in made:
        tensor[:, :, longest:] = torch.nan
    return made


def a_step(dtype: torch.dtype, width: int, seed: int, longest: int) -> list[Tensor]:
    """Queries, keys and values of new positions, slots in any order, lengths up to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, 3 * HEADS, width, generator=generator).to(CUDA, dtype).chunk(3, dim=1)
    slots = torch.randperm(SLOTS, generator=generator)[:ROWS]
    lengths = torch.randint(1, longest + 1, (ROWS,), generator=generator)
    return [*rows, slots.to(CUDA), lengths.to(CUDA)]


@pytest.mark.parametrize("width", [32, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_agrees_with_plain_torch(dtype: torch.dtype, width: int) -> None:
    assert kernel_refusal(CUDA, dtype, width) is None
    for longest in (1, 64, 200):
        q, _, _, slots, lengths = a_step(dtype, width, longest, longest)
        arguments = (q, *cache(dtype, width, longest), slots, lengths)
        found, expected = slot_attention(*arguments), slot_attention_plain(*arguments)
        torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@torch.inference_mode()
def test_a_graph_replays_a_step_for_other_slots_and_lengths() -> None:
    keys, values = cache(torch.bfloat16, 64, CAPACITY)
    inputs = a_step(torch.bfloat16, 64, 0, CAPACITY)

    def step() -> Tensor:
        q, k, v, slots, lengths = inputs
        store(keys, values, k, v, slots, lengths - 1)
        return slot_attention(q, keys, values, slots, lengths)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in (1, 2):
        for place, new in zip(inputs, a_step(torch.bfloat16, 64, seed, CAPACITY), strict=True):
            place.copy_(new)
        graph.replay()
        q, k, _, slots, lengths = inputs
        torch.testing.assert_close(keys[slots, :, lengths - 1], k, atol=0, rtol=0)
        expected = slot_attention_plain(q, keys, values, slots, lengths)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_waits_for_nothing() -> None:
    keys, values = cache(torch.bfloat16, 64, CAPACITY)
    q, k, v, slots, lengths = a_step(torch.bfloat16, 64, 0, CAPACITY)
    slot_attention(q, keys, values, slots, lengths)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        store(keys, values, k, v, slots, lengths - 1)
        slot_attention(q, keys, values, slots, lengths)
        slot_attention_plain(q, keys, values, slots, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
