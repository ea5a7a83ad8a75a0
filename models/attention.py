"""Causal attention in the three layouts that occur: rectangular, packed, and one step against a cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.layers import Attend

_BLOCK = 32  # positions by which caches grow


def causal_attention(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H K"]
) -> Float[Tensor, "B T H K"]:
    """Each position attends to itself and those before it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # For this type torch's kernel takes four times as long on a CPU, nearly all of it in the backward pass.
        later = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return plain_attention(q, k, v, later).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain_attention(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B H S K"],
    v: Float[Tensor, "B H S K"],
    hidden: Bool[Tensor, "#B #H #Q S"] | None = None,
) -> Float[Tensor, "B H Q K"]:
    """Attention by its definition, with a float32 softmax; what `hidden` marks is not seen."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, Q, S)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).type_as(v) @ v


def packed_causal_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    """Causal attention inside each sequence of a packed batch (P, H, K), P the sum of `lengths`.

    `lengths` are numbers of the host, so that no step waits for the device. On CUDA xformers attends without padding.
    Elsewhere sequences are padded on the right, where a causal mask hides the padding from every real position.
    """
    return _xformers_attention(lengths, device) if device.type == "cuda" else _padded_attention(lengths, device)


class KVCache:
    """Keys and values of a stack of layers, for B sequences that grow position by position to at most `capacity`.

    One query a sequence makes no use of torch's attention kernels; the plain products are faster.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._capacity = capacity
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def step(self, position: int) -> Iterator[Attend]:
        """For each layer: attention of one new position of every sequence to all up to it."""
        room = self._room(position + 1)
        for layer in range(len(self._layers)):
            yield partial(self._step, layer, position, room)

    def ragged_step(self, rows: Int[Tensor, " R"], last: Int[Tensor, " B"]) -> Iterator[Attend]:
        """For each layer: attention of a new position of some sequences to all up to their own `last`.

        All sequences attend, and what the others get is thrown away: to choose keys and values of some is to copy them.
        """
        room = self._room(int(last[rows].max()) + 1)
        later = torch.arange(room, device=last.device) > last[:, None]  # (B, S)
        for layer in range(len(self._layers)):
            yield partial(self._ragged_step, layer, rows, last, later)

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take now."""
        return sum(x.nbytes for pair in self._layers if pair is not None for x in pair)

    def _step(self, layer: int, position: int, room: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._storage(layer, k, len(k), room)
        keys[:, :, position], values[:, :, position] = k, v
        return plain_attention(q[:, :, None], keys, values, _later(position, room, k.device))[:, :, 0]

    def _ragged_step(
        self, layer: int, rows: Tensor, last: Tensor, later: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        keys, values = self._storage(layer, k, *later.shape)
        keys[rows, :, last[rows]], values[rows, :, last[rows]] = k, v
        queries = q.new_zeros(len(last), *q.shape[1:]).index_copy(0, rows, q)
        mixed = plain_attention(queries[:, :, None], keys, values, later[:, None, None])[:, :, 0]
        return mixed.index_select(0, rows)

    def _room(self, filled: int) -> int:
        """Positions of whole blocks that hold `filled` positions."""
        if filled > self._capacity:
            raise ValueError(
                f"position {filled - 1} of a cache for {self._capacity} positions, expected one below that"
            )
        return min(self._capacity, -(-filled // _BLOCK) * _BLOCK)

    def _storage(self, layer: int, like: Tensor, batch: int, room: int) -> tuple[Tensor, Tensor]:
        """The first `room` positions of a layer, (B, H, S, K), in the type that attention computes in.

        Zeros at first: what is masked must be finite. On CUDA all is allocated at once. On a CPU it grows a block at a
        time, because products of bfloat16 copy any array that is not contiguous, as a part of a longer one.
        """
        pair = self._layers[layer]
        heads, width = like.shape[-2:]
        if pair is None:
            length = self._capacity if like.is_cuda else room
            keys = like.new_zeros(batch, heads, length, width)
            pair = self._layers[layer] = (keys, torch.zeros_like(keys))
        elif pair[0].shape[2] < room:
            more = like.new_zeros(batch, heads, room - pair[0].shape[2], width)
            pair = self._layers[layer] = (torch.cat([pair[0], more], dim=2), torch.cat([pair[1], more], dim=2))
        return pair[0][:, :, :room], pair[1][:, :, :room]


@lru_cache(maxsize=1024)
@torch.inference_mode(mode=False)  # made while sampling, it must serve outside too
def _later(position: int, room: int, device: torch.device) -> Bool[Tensor, " S"]:
    """Which of the first `room` positions come after `position`."""
    return torch.arange(room, device=device) > position


def _padded_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    shape = (len(lengths), max(lengths))
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    places = real.flatten().nonzero()[:, 0].to(device)  # (P,)

    def pad(packed: Tensor) -> Tensor:
        padded = packed.new_zeros(real.numel(), *packed.shape[1:])
        return padded.index_copy(0, places, packed).unflatten(0, shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(pad(q), pad(k), pad(v)).flatten(0, 1).index_select(0, places)

    return attend


def _xformers_attention(lengths: Sequence[int], device: torch.device) -> Attend:
    bias = _xformers().fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_within_blocks(q, k, v, bias)

    return attend


@torch.compiler.disable  # the mask is another object at every step, and looking into it would compile anew each time
def _attend_within_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    return _xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


@lru_cache(maxsize=1)
def _xformers() -> Any:
    """xformers, without its warning about C++ extensions: torch's own kernels do the work here."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import xformers.ops

    logger.setLevel(level)
    return xformers.ops
