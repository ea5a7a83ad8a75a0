"""Triton kernel of `slot_attention`. Importing this file imports Triton.

One program attends for one head of one row, block by block of its positions. Each key and value is read once, and
little else is: the kernel is bound by memory. At 64 guided images and 12 heads there are 1536 programs, and four fit on
an SM. Each copies the next two blocks to shared memory while it computes on one. In bfloat16 that is 32 KiB a program
and 128 KiB an SM; about 16 KiB hide the latency of an H100's memory.

Sequences are not split among programs with a second reduction (flash-decoding). Splits pay where rows times heads do
not fill the device. There a step is bound by the weights of its linear layers, and 1024 positions are only 16 blocks.

Each place in a block has a softmax of its own, over the positions that it meets in all blocks: a maximum, a sum and a
mixture of values. They are merged once, at the end. A softmax over whole blocks would need two reductions across warps
in each.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_TILE = 4096  # numbers of a block of keys, or of values: 32 a thread, which stay in registers
_LOWEST = tl.constexpr(-3.0e38)  # below every finite score; the difference of two infinities would be NaN


def attend(
    q: Float[Tensor, "R H K"],
    keys: Float[Tensor, "S H T K"],
    values: Float[Tensor, "S H T K"],
    slots: Int[Tensor, " R"],
    lengths: Int[Tensor, " R"],
) -> Float[Tensor, "R H K"]:
    """Attention as in `slot_attention`, of contiguous keys and values on the current CUDA device.

    The first call with these shapes and dtypes compiles the kernel and loads it, which a CUDA graph cannot capture.
    """
    rows, heads, width = q.shape
    out = q.new_empty(q.shape)
    _attend_head[(rows, heads)](
        q,
        keys,
        values,
        slots.contiguous(),
        lengths.contiguous(),
        out,
        *q.stride(),
        keys.shape[2],
        width**-0.5,
        **block_shape(width),
        num_warps=4,
    )
    return out


def block_shape(width: int) -> dict[str, int]:
    """Sizes that are fixed when the kernel is compiled for heads of `width` channels. Blocks are powers of two."""
    padded = max(triton.next_power_of_2(width), 16)
    return {"WIDTH": width, "PADDED": padded, "BLOCK": max(_TILE // padded, 16)}


@triton.jit
@no_type_check  # its arguments are Triton's pointers, and its source is compiled without decorators
def _attend_head(
    q,
    keys,
    values,
    slots,
    lengths,
    out,
    row_stride,
    head_stride,
    channel_stride,
    capacity,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one row. The shape of a block is (BLOCK, PADDED): channels from WIDTH on are masked."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths + row)
    slot = tl.load(slots + row).to(tl.int64)  # a cache may have more than 2^31 elements
    channels = tl.arange(0, PADDED)
    real = channels < WIDTH
    query = tl.load(q + row * row_stride + head * head_stride + channels * channel_stride, mask=real, other=0.0)
    query = query.to(tl.float32) * scale
    first = (slot * heads + head) * capacity * WIDTH

    highest = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PADDED), tl.float32)
    for start in tl.range(0, length, BLOCK, num_stages=3):  # one block in use, two on their way
        positions = start + tl.arange(0, BLOCK)
        counts = positions < length
        places = first + positions[:, None] * WIDTH + channels[None, :]
        mask = counts[:, None] & real[None, :]
        key = tl.load(keys + places, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + places, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(counts, tl.sum(key * query[None, :], axis=1), float("-inf"))
        higher = tl.maximum(highest, scores)
        shrink, weights = tl.exp(highest - higher), tl.exp(scores - higher)
        total = total * shrink + weights
        mixed = mixed * shrink[:, None] + weights[:, None] * value
        highest = higher

    shares = tl.exp(highest - tl.max(highest, axis=0))
    attended = tl.sum(mixed * shares[:, None], axis=0) / tl.sum(total * shares, axis=0)
    tl.store(out + (row * heads + head) * WIDTH + channels, attended.to(out.dtype.element_ty), mask=real)
