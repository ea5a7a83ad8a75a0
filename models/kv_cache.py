"""Keys and values of positions that are done, and attention of one new position of a sequence to them.

With one query a sequence, attention reads each key and value once and computes next to nothing. Both products are
weighted sums of rows: of a head's keys, laid out channel by channel in blocks of positions, weighted by the query, and
of its values, weighted by the softmax. On a CPU torch's `embedding_bag` makes such sums as fast as memory is read,
three times as fast as its matrix products, and of the sequences that are asked for only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.layers import Attend

_BLOCK = 64  # positions that lie together in a channel's row of keys: in shorter rows their sums are slower
_KEPT = 8  # tables of places that are remembered: of keys and values, in this step and the last


class KVCache:
    """Keys and values of a stack of layers, for B sequences that grow position by position to at most `capacity`."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._capacity = capacity
        self._layers: list[_Layer | None] = [None] * num_layers

    def step(self, position: int) -> Iterator[Attend]:
        """For each layer: attention of one new position of every sequence to all up to it."""
        self._check(position)
        for layer in range(len(self._layers)):
            yield partial(self._step, layer, position)

    def ragged_step(self, rows: Int[Tensor, " R"], last: Int[Tensor, " B"]) -> Iterator[Attend]:
        """For each layer: attention of a new position of some sequences to all up to their own `last`."""
        length = int(last[rows].max()) + 1
        self._check(length - 1)
        later = torch.arange(length, device=last.device) > last[rows][:, None]  # (R, S)
        step = partial(self._ragged_step, len(last), _Chosen(rows), last[rows], later[:, None])
        for layer in range(len(self._layers)):
            yield partial(step, layer)

    @property
    def num_bytes(self) -> int:
        """Memory of the blocks that hold positions."""
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
            raise ValueError(f"position {position} of a cache for {self._capacity} positions, expected one below that")

    def _layer(self, number: int, like: Tensor, batch: int, filled: int) -> _Layer:
        """A layer with room for the positions that are filled; its memory is reserved when it is first asked for."""
        layer = self._layers[number]
        if layer is None:
            blocks, (heads, width) = -(-self._capacity // _BLOCK), like.shape[-2:]
            layer = self._layers[number] = _Layer(
                keys=like.new_empty(blocks, batch, heads, width, _BLOCK),
                values=like.new_empty(batch, heads, blocks * _BLOCK, width),
            )
        layer.begin(-(-filled // _BLOCK))
        return layer


@dataclass
class _Layer:
    """Keys and values of one layer. Memory for all positions is reserved, and on a CPU taken when a block begins."""

    keys: Float[Tensor, "N B H K block"]
    values: Float[Tensor, "B H N*block K"]
    begun: int = 0

    def begin(self, blocks: int) -> None:
        """Fill new blocks with zeros: what is masked must be finite."""
        if blocks > self.begun:
            self.keys[self.begun : blocks].zero_()
            self.values[:, :, self.begun * _BLOCK : blocks * _BLOCK].zero_()
            self.begun = blocks

    @property
    def num_bytes(self) -> int:
        """Memory of the blocks that have begun."""
        return (self.keys.nbytes + self.values.nbytes) * self.begun // len(self.keys)


class _Chosen:
    """Sequences that take a step. All layers find the rows of their tables at the same places."""

    def __init__(self, rows: Int[Tensor, " R"]) -> None:
        self.rows = rows
        self._places: dict[tuple[int, ...], Tensor] = {}

    def keys(self, blocks: int, batch: int, heads: int, width: int) -> Int[Tensor, "N*R*H K"]:
        """Rows of each head's keys in the first blocks, where (N, B, H, K) rows lie behind each other."""

        def find() -> Tensor:
            heads_before = (torch.arange(blocks)[:, None] * batch + self.rows)[..., None] * heads + torch.arange(heads)
            return heads_before.view(-1, 1) * width + torch.arange(width)

        return self._remember((blocks, batch, heads, width), find)

    def values(self, heads: int, height: int, count: int) -> Int[Tensor, "R*H N"]:
        """Rows of each head's first values, where (B, H, height) rows lie behind each other."""

        def find() -> Tensor:
            heads_before = self.rows[:, None] * heads + torch.arange(heads)
            return heads_before.view(-1, 1) * height + torch.arange(count)

        return self._remember((heads, height, count), find)

    @torch.inference_mode(mode=False)  # found while sampling, they must serve outside too
    def _remember(self, key: tuple[int, ...], find: Callable[[], Tensor]) -> Tensor:
        if key not in self._places:
            if len(self._places) == _KEPT:
                self._places.clear()
            self._places[key] = find().int()
        return self._places[key]


def _attend(
    q: Float[Tensor, "R H K"], layer: _Layer, chosen: _Chosen, length: int, later: Bool[Tensor, "R 1 L"] | None
) -> Float[Tensor, "R H K"]:
    """Attention of one query each to the first `length` positions, float32 softmax; what is `later` is not seen."""
    blocks = -(-length // _BLOCK)
    score, mix = (_score_rows, _mix_rows) if q.device.type == "cpu" else (_score_products, _mix_products)
    scores = score(q * q.shape[-1] ** -0.5, layer.keys, chosen, blocks)  # (N, R, H, block)
    scores = scores.permute(1, 2, 0, 3).flatten(2)[..., :length]  # (R, H, L)
    if later is not None:
        scores = scores.masked_fill(later, -torch.inf)
    return mix(scores.softmax(dim=-1, dtype=torch.float32).type_as(q), layer.values, chosen)


def _score_rows(
    q: Float[Tensor, "R H K"], keys: Float[Tensor, "N B H K block"], chosen: _Chosen, blocks: int
) -> Float[Tensor, "N R H block"]:
    """Products of queries with the keys of the first blocks: each head's channels times the query, added up."""
    _, batch, heads, width, _ = keys.shape
    places = chosen.keys(blocks, batch, heads, width)
    weights = q.expand(blocks, *q.shape).flatten(0, 2)
    summed = F.embedding_bag(places, keys.flatten(0, 3), mode="sum", per_sample_weights=weights)
    return summed.view(blocks, *q.shape[:2], _BLOCK)


def _mix_rows(
    weights: Float[Tensor, "R H L"], values: Float[Tensor, "B H P K"], chosen: _Chosen
) -> Float[Tensor, "R H K"]:
    """Each head's first L values times their weights, added up in float32."""
    _, heads, height, _ = values.shape
    places = chosen.values(heads, height, weights.shape[2])
    summed = F.embedding_bag(places, values.flatten(0, 2), mode="sum", per_sample_weights=weights.flatten(0, 1))
    return summed.view(*weights.shape[:2], -1)


def _score_products(
    q: Float[Tensor, "R H K"], keys: Float[Tensor, "N B H K block"], chosen: _Chosen, blocks: int
) -> Float[Tensor, "N R H block"]:
    """The same by matrix products of all sequences: to choose the tables of some is to copy them."""
    everyone = q.new_zeros(keys.shape[1], *q.shape[1:]).index_copy(0, chosen.rows, q)
    return (everyone[:, :, None] @ keys[:blocks])[..., 0, :].index_select(1, chosen.rows)


def _mix_products(
    weights: Float[Tensor, "R H L"], values: Float[Tensor, "B H P K"], chosen: _Chosen
) -> Float[Tensor, "R H K"]:
    """The same by matrix products of all sequences."""
    everyone = weights.new_zeros(len(values), *weights.shape[1:]).index_copy(0, chosen.rows, weights)
    return (everyone[:, :, None] @ values[:, :, : weights.shape[2]])[:, :, 0].index_select(0, chosen.rows)


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _everyone(count: int, device: torch.device) -> _Chosen:
    return _Chosen(torch.arange(count, device=device))
