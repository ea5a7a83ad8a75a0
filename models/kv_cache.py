"""Keys and values of positions that are done, and attention of one new position of a sequence to them.

With one query a sequence, attention reads each key and value once and computes next to nothing. Both products are
weighted sums of rows: of a head's keys, laid out channel by channel, weighted by the query, and of its values, weighted
by the softmax. On a CPU torch's `embedding_bag` makes such sums as fast as memory is read, three times as fast as its
matrix products, and of the sequences that are asked for only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.layers import Attend

_BLOCK = 32  # positions by which caches grow
_KEPT = 8  # places that are remembered: of keys and values, in this step and the last


class KVCache:
    """Keys and values of a stack of layers, for B sequences that grow position by position to at most `capacity`."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._capacity, self._size = capacity, 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def step(self, position: int) -> Iterator[Attend]:
        """For each layer: attention of one new position of every sequence to all up to it."""
        room = self._room(position + 1)
        for layer in range(len(self._layers)):
            yield partial(self._step, layer, position, room)

    def ragged_step(self, rows: Int[Tensor, " R"], last: Int[Tensor, " B"]) -> Iterator[Attend]:
        """For each layer: attention of a new position of some sequences to all up to their own `last`."""
        length = int(last[rows].max()) + 1
        later = torch.arange(length, device=last.device) > last[rows][:, None]  # (R, S)
        step = partial(self._ragged_step, len(last), self._room(length), _Chosen(rows), last[rows], later)
        for layer in range(len(self._layers)):
            yield partial(step, layer)

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take now."""
        return sum(x.nbytes for pair in self._layers if pair is not None for x in pair)

    def _step(self, layer: int, position: int, room: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._storage(layer, k, len(k), room)
        keys[..., position], values[:, :, position] = k, v
        return _attend(q, keys, values, _everyone(len(q), q.device), position + 1, None)

    def _ragged_step(
        self,
        batch: int,
        room: int,
        chosen: _Chosen,
        last: Tensor,
        later: Tensor,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        keys, values = self._storage(layer, k, batch, room)
        keys[chosen.rows, :, :, last], values[chosen.rows, :, last] = k, v
        return _attend(q, keys, values, chosen, later.shape[1], later[:, None])

    def _room(self, filled: int) -> int:
        """Positions of whole blocks that hold `filled` positions, and all that there were before."""
        if filled > self._capacity:
            raise ValueError(
                f"position {filled - 1} of a cache for {self._capacity} positions, expected one below that"
            )
        self._size = max(self._size, min(self._capacity, -(-filled // _BLOCK) * _BLOCK))
        return self._size

    def _storage(self, layer: int, like: Tensor, batch: int, room: int) -> tuple[Tensor, Tensor]:
        """Keys (B, H, K, S) and values (B, H, S, K) of a layer, with `room` positions.

        Zeros at first: what is masked must be finite. They grow a block at a time, so that a row of keys is as long as
        what is read of it.
        """
        pair = self._layers[layer]
        heads, width = like.shape[-2:]
        if pair is None:
            keys = like.new_zeros(batch, heads, width, room)
            pair = self._layers[layer] = (keys, like.new_zeros(batch, heads, room, width))
        elif (missing := room - pair[0].shape[3]) > 0:
            more = like.new_zeros(batch, heads, width, missing)
            keys, values = torch.cat([pair[0], more], dim=3), torch.cat([pair[1], more.transpose(2, 3)], dim=2)
            pair = self._layers[layer] = (keys, values)
        return pair


class _Chosen:
    """Sequences that take a step. All layers find the rows of their tables at the same places."""

    def __init__(self, rows: Int[Tensor, " R"]) -> None:
        self.rows = rows
        self._places: dict[tuple[int, int, int], Tensor] = {}

    @torch.inference_mode(mode=False)  # found while sampling, they must serve outside too
    def places(self, heads: int, height: int, count: int) -> Int[Tensor, "R*H N"]:
        """Of the first `count` rows of each head's table, where tables of `height` rows lie behind each other."""
        shape = (heads, height, count)
        if shape not in self._places:
            if len(self._places) == _KEPT:
                self._places.clear()
            first = (self.rows[:, None] * heads + torch.arange(heads)).view(-1, 1) * height
            self._places[shape] = (first + torch.arange(count)).int()
        return self._places[shape]


def _attend(
    q: Float[Tensor, "R H K"],
    keys: Float[Tensor, "B H K S"],
    values: Float[Tensor, "B H S K"],
    chosen: _Chosen,
    length: int,
    later: Bool[Tensor, "R 1 L"] | None,
) -> Float[Tensor, "R H K"]:
    """Attention of one query each to the first `length` positions, float32 softmax; what is `later` is not seen."""
    add_up = _weighted_rows if q.device.type == "cpu" else _products
    scores = add_up(q * q.shape[-1] ** -0.5, keys, chosen)[..., :length]  # (R, H, L)
    if later is not None:
        scores = scores.masked_fill(later, -torch.inf)
    return add_up(scores.softmax(dim=-1, dtype=torch.float32).type_as(q), values, chosen)


def _weighted_rows(
    weights: Float[Tensor, "R H N"], tables: Float[Tensor, "B H M W"], chosen: _Chosen
) -> Float[Tensor, "R H W"]:
    """For each head the sum of the first N rows of its table times their weights, added up in float32."""
    places = chosen.places(tables.shape[1], tables.shape[2], weights.shape[2])
    summed = F.embedding_bag(places, tables.flatten(0, 2), mode="sum", per_sample_weights=weights.flatten(0, 1))
    return summed.view(*weights.shape[:2], -1)


def _products(
    weights: Float[Tensor, "R H N"], tables: Float[Tensor, "B H M W"], chosen: _Chosen
) -> Float[Tensor, "R H W"]:
    """The same by matrix products of all sequences: to choose the tables of some is to copy them."""
    everyone = weights.new_zeros(len(tables), *weights.shape[1:]).index_copy(0, chosen.rows, weights)
    return (everyone[:, :, None] @ tables[:, :, : weights.shape[2]])[:, :, 0].index_select(0, chosen.rows)


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _everyone(count: int, device: torch.device) -> _Chosen:
    return _Chosen(torch.arange(count, device=device))
