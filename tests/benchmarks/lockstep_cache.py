"""KV cache: keys and values of earlier positions, and attention of one new position of each sequence to them.

With one query per sequence, attention is bound by memory: it reads each key and value once. Both products are weighted
sums of rows. Scores sum a head's keys, stored channel by channel in blocks of positions, weighted by the query. Outputs
sum its values, weighted by the softmax. On a CPU torch's `embedding_bag` computes such sums at the speed of memory,
three times as fast as matrix products, and reads only the sequences that take the step.

Shapes: M blocks of the cache, m of them in use, `block` positions each; B sequences, R of them take a step; L positions
that a query attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.layers import Attend

_BLOCK = 64  # positions of a channel that are adjacent in memory: sums over shorter rows are slower
_KEPT = 8  # index tables that are remembered: for keys and values, of this step and the last


class KVCache:
    """Keys and values of a stack of layers, for B sequences that grow position by position up to `capacity`.

    The first call of a layer's `Attend` fixes B, H, K and the dtype.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._capacity = capacity
        self._layers: list[_Layer | None] = [None] * num_layers

    def step(self, position: int) -> Iterator[Attend]:
        """Attention of each layer for one step in which every sequence takes `position`.

        Each `Attend` maps queries, keys and values (B, H, K) of the new position to attended values (B, H, K).

        Raises:
            ValueError: The position is beyond the capacity.
        """
        self._check(position)
        for layer in range(len(self._layers)):
            yield partial(self._step, layer, position)

    def ragged_step(self, rows: Int[Tensor, " R"], last: Int[Tensor, " B"]) -> Iterator[Attend]:
        """Attention of each layer for one step of some sequences.

        Sequence `rows[i]` takes position `last[rows[i]]`. Other sequences do not change, and their `last` is ignored.
        Each `Attend` maps queries, keys and values (R, H, K) of the new positions to attended values (R, H, K).

        Raises:
            ValueError: A position is beyond the capacity.
        """
        length = int(last[rows].max()) + 1
        self._check(length - 1)
        later = torch.arange(length, device=last.device) > last[rows][:, None]  # (R, L)
        step = partial(self._ragged_step, len(last), _Chosen(rows), last[rows], later[:, None])
        for layer in range(len(self._layers)):
            yield partial(step, layer)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks that hold positions, over all layers."""
        return sum(layer.num_bytes for layer in self._layers if layer is not None)

    def _step(self, number: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = self._layer(number, k, len(k), position + 1)
        block, place = divmod(position, _BLOCK)
        layer.keys[block, ..., place], layer.values[:, :, position] = k, v
        return _attend(q, layer, _everyone(len(q), q.device), position + 1, None)

    def _ragged_step(
        self, batch: int, chosen: _Chosen, last: Tensor, later: Tensor, number: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        layer = self._layer(number, k, batch, later.shape[-1])
        layer.keys[last // _BLOCK, chosen.rows, :, :, last % _BLOCK] = k
        layer.values[chosen.rows, :, last] = v
        return _attend(q, layer, chosen, later.shape[-1], later)

    def _check(self, position: int) -> None:
        if position >= self._capacity:
            raise ValueError(
                f"position is {position}, expected 0..{self._capacity - 1}: the cache holds {self._capacity} positions"
            )

    def _layer(self, number: int, like: Tensor, batch: int, filled: int) -> _Layer:
        """The layer, with blocks for `filled` positions. Its memory is allocated at the first call."""
        layer = self._layers[number]
        if layer is None:
            blocks, (heads, width) = -(-self._capacity // _BLOCK), like.shape[-2:]
            layer = self._layers[number] = _Layer(
                keys=like.new_empty(blocks, batch, heads, width, _BLOCK),
                values=like.new_empty(batch, heads, blocks * _BLOCK, width),
            )
        layer.use(-(-filled // _BLOCK))
        return layer


@dataclass
class _Layer:
    """Keys and values of one layer.

    Memory is allocated for all positions. On a CPU the system provides its pages when a block is first written.
    """

    keys: Float[Tensor, "M B H K block"]
    values: Float[Tensor, "B H M*block K"]
    used: int = 0

    def use(self, blocks: int) -> None:
        """Fill blocks with zeros when they come into use: masked scores and values must be finite."""
        if blocks > self.used:
            self.keys[self.used : blocks].zero_()
            self.values[:, :, self.used * _BLOCK : blocks * _BLOCK].zero_()
            self.used = blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return (self.keys.nbytes + self.values.nbytes) * self.used // len(self.keys)


class _Chosen:
    """The sequences that take a step, and where their rows are in the tables of keys and values.

    All layers share these indices, so they are computed once a step.
    """

    def __init__(self, rows: Int[Tensor, " R"]) -> None:
        self.rows = rows
        self._places: dict[tuple[Any, ...], Tensor] = {}

    def keys(self, blocks: int, batch: int, heads: int, width: int) -> Int[Tensor, "rows K"]:
        """Indices of each head's rows of keys in the first blocks of a table (M * B * H * K, block)."""
        return self._remembered(_key_places, blocks, batch, heads, width)

    def values(self, heads: int, height: int, count: int) -> Int[Tensor, "rows L"]:
        """Indices of each head's first `count` rows of values in a table (B * H * height, K)."""
        return self._remembered(_value_places, heads, height, count)

    def _remembered(self, places: Callable[..., Tensor], *sizes: int) -> Tensor:
        key = (places, *sizes)
        if key not in self._places:
            if len(self._places) == _KEPT:
                self._places.clear()
            with torch.inference_mode(mode=False):  # indices first made while sampling are used by training too
                self._places[key] = places(self.rows, *sizes).int()
        return self._places[key]


def _key_places(rows: Int[Tensor, " R"], blocks: int, batch: int, heads: int, width: int) -> Int[Tensor, "rows K"]:
    heads_before = (torch.arange(blocks)[:, None] * batch + rows)[..., None] * heads + torch.arange(heads)
    return heads_before.view(-1, 1) * width + torch.arange(width)


def _value_places(rows: Int[Tensor, " R"], heads: int, height: int, count: int) -> Int[Tensor, "rows L"]:
    heads_before = rows[:, None] * heads + torch.arange(heads)
    return heads_before.view(-1, 1) * height + torch.arange(count)


def _attend(
    q: Float[Tensor, "R H K"], layer: _Layer, chosen: _Chosen, length: int, later: Bool[Tensor, "R 1 L"] | None
) -> Float[Tensor, "R H K"]:
    """Attention of one query per sequence to the first `length` positions, with a float32 softmax.

    Positions where `later` is true are ignored.
    """
    blocks = -(-length // _BLOCK)
    score, mix = (_score_rows, _mix_rows) if q.device.type == "cpu" else (_score_products, _mix_products)
    scores = score(q * q.shape[-1] ** -0.5, layer.keys, chosen, blocks)  # (m, R, H, block)
    scores = scores.permute(1, 2, 0, 3).flatten(2)[..., :length]  # (R, H, L)
    if later is not None:
        scores = scores.masked_fill(later, -torch.inf)
    return mix(scores.softmax(dim=-1, dtype=torch.float32).type_as(q), layer.values, chosen)


def _score_rows(
    q: Float[Tensor, "R H K"], keys: Float[Tensor, "M B H K block"], chosen: _Chosen, blocks: int
) -> Float[Tensor, "m R H block"]:
    """Scores of the keys in the first blocks: each head's channels weighted by the query, then summed."""
    _, batch, heads, width, _ = keys.shape
    places = chosen.keys(blocks, batch, heads, width)
    weights = q.expand(blocks, *q.shape).flatten(0, 2)
    summed = F.embedding_bag(places, keys.flatten(0, 3), mode="sum", per_sample_weights=weights)
    return summed.view(blocks, *q.shape[:2], _BLOCK)


def _mix_rows(
    weights: Float[Tensor, "R H L"], values: Float[Tensor, "B H S K"], chosen: _Chosen
) -> Float[Tensor, "R H K"]:
    """Each head's first L values, weighted and summed in float32."""
    _, heads, height, _ = values.shape
    places = chosen.values(heads, height, weights.shape[2])
    summed = F.embedding_bag(places, values.flatten(0, 2), mode="sum", per_sample_weights=weights.flatten(0, 1))
    return summed.view(*weights.shape[:2], -1)


def _score_products(
    q: Float[Tensor, "R H K"], keys: Float[Tensor, "M B H K block"], chosen: _Chosen, blocks: int
) -> Float[Tensor, "m R H block"]:
    """Scores as in `_score_rows`, by matrix products over all sequences: selecting some would copy their keys."""
    everyone = q.new_zeros(keys.shape[1], *q.shape[1:]).index_copy(0, chosen.rows, q)
    return (everyone[:, :, None] @ keys[:blocks])[..., 0, :].index_select(1, chosen.rows)


def _mix_products(
    weights: Float[Tensor, "R H L"], values: Float[Tensor, "B H S K"], chosen: _Chosen
) -> Float[Tensor, "R H K"]:
    """Values as in `_mix_rows`, by matrix products over all sequences."""
    everyone = weights.new_zeros(len(values), *weights.shape[1:]).index_copy(0, chosen.rows, weights)
    return (everyone[:, :, None] @ values[:, :, : weights.shape[2]])[:, :, 0].index_select(0, chosen.rows)


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _everyone(count: int, device: torch.device) -> _Chosen:
    return _Chosen(torch.arange(count, device=device))
