"""KV cache: keys and values of earlier positions of images in slots, and attention of one new position of some of them.

With one query per sequence, attention is bound by memory: it reads each key and value once. On a GPU one kernel does
that, see slot_attention.py. On a CPU both products are weighted sums of rows. Scores sum a head's keys, stored channel
by channel in blocks of positions, weighted by the query. Outputs sum its values, weighted by the softmax. Torch's
`embedding_bag` computes such sums at the speed of memory, three times as fast as matrix products, and reads only the
slots that take the step.

Shapes: S slots, R of them take a step; M blocks of `block` positions each; L positions that a step reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.layers import Attend
from models.slot_attention import slot_attention, store

_BLOCK = 64  # positions of a channel that are adjacent in memory: sums over shorter rows are slower


class KVCache:
    """Keys and values of a stack of layers, for one sequence in each slot.

    Nothing is cleared when a slot gets another sequence: a step reads positions up to its own, which that sequence has
    written. The first call of a layer's `Attend` fixes H, K and the dtype.
    """

    def __init__(self, num_layers: int, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._layers: list[_RowSums | _OneKernel | None] = [None] * num_layers

    def step(self, slots: Int[Tensor, " R"], positions: Int[Tensor, " R"]) -> Iterator[Attend]:
        """Attention of each layer for one step: the sequence in `slots[i]` takes position `positions[i]`.

        Each `Attend` maps queries, keys and values (R, H, K) of the new positions to attended values (R, H, K).
        """
        step = _Step(slots, positions, self.slots)
        for layer in range(len(self._layers)):
            yield partial(self._attend, layer, step)

    def prefill(self, slots: Int[Tensor, "*#R"], positions: Int[Tensor, "*#R"], attend: Attend) -> Iterator[Attend]:
        """Attention of each layer for the first positions of some sequences at once.

        Each `Attend` attends as `attend` does, and keeps the keys and values (..., H, K) of all rows.
        """
        for layer in range(len(self._layers)):
            yield partial(self._prefill, layer, slots, positions, attend)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers if layer is not None)

    def _attend(self, number: int, step: _Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._layer(number, k).attend(step, q, k, v)

    def _prefill(
        self, number: int, slots: Tensor, positions: Tensor, attend: Attend, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        self._layer(number, k).write(slots, positions, k, v)
        return attend(q, k, v)

    def _layer(self, number: int, like: Tensor) -> _RowSums | _OneKernel:
        layer = self._layers[number]
        if layer is None:
            kind = _RowSums if like.device.type == "cpu" else _OneKernel
            layer = self._layers[number] = kind.empty(self.slots, self.capacity, like)
        return layer


@dataclass(frozen=True)
class _OneKernel:
    """Keys and values of one layer on a GPU."""

    keys: Float[Tensor, "S H T K"]
    values: Float[Tensor, "S H T K"]

    @classmethod
    def empty(cls, slots: int, capacity: int, like: Float[Tensor, "R H K"]) -> _OneKernel:
        """A layer whose memory holds anything."""
        heads, width = like.shape[-2:]
        keys, values = (like.new_empty(slots, heads, capacity, width) for _ in range(2))
        return cls(keys, values)

    def write(
        self,
        slots: Int[Tensor, "*#R"],
        positions: Int[Tensor, "*#R"],
        k: Float[Tensor, "*R H K"],
        v: Float[Tensor, "*R H K"],
    ) -> None:
        """Keep keys and values of some positions."""
        store(self.keys, self.values, k, v, slots, positions)

    def attend(
        self, step: _Step, q: Float[Tensor, "R H K"], k: Float[Tensor, "R H K"], v: Float[Tensor, "R H K"]
    ) -> Float[Tensor, "R H K"]:
        """Write the new positions and attend to them and all before."""
        self.write(step.slots, step.positions, k, v)
        return slot_attention(q, self.keys, self.values, step.slots, step.positions + 1)


@dataclass(frozen=True)
class _RowSums:
    """Keys and values of one layer on a CPU."""

    keys: Float[Tensor, "M S H K block"]
    values: Float[Tensor, "S H M*block K"]

    @classmethod
    def empty(cls, slots: int, capacity: int, like: Float[Tensor, "R H K"]) -> _RowSums:
        """A layer of zeros: masked scores and values must be finite."""
        blocks, (heads, width) = -(-capacity // _BLOCK), like.shape[-2:]
        return cls(
            keys=like.new_zeros(blocks, slots, heads, width, _BLOCK),
            values=like.new_zeros(slots, heads, blocks * _BLOCK, width),
        )

    def write(
        self,
        slots: Int[Tensor, "*#R"],
        positions: Int[Tensor, "*#R"],
        k: Float[Tensor, "*R H K"],
        v: Float[Tensor, "*R H K"],
    ) -> None:
        """Keep keys and values of some positions."""
        self.keys[positions // _BLOCK, slots, :, :, positions % _BLOCK] = k
        self.values[slots, :, positions] = v

    def attend(
        self, step: _Step, q: Float[Tensor, "R H K"], k: Float[Tensor, "R H K"], v: Float[Tensor, "R H K"]
    ) -> Float[Tensor, "R H K"]:
        """Write the new positions and attend to them and all before, with a float32 softmax."""
        self.write(step.slots, step.positions, k, v)
        scores = self._scores(step, q * q.shape[-1] ** -0.5).masked_fill(step.later[:, None], -torch.inf)
        return self._mix(step, scores.softmax(dim=-1, dtype=torch.float32).type_as(q))

    def _scores(self, step: _Step, q: Float[Tensor, "R H K"]) -> Float[Tensor, "R H L"]:
        """Each head's channels of keys, weighted by the query and summed."""
        _, heads, width = q.shape
        weights = q.expand(step.blocks, *q.shape).flatten(0, 2)
        summed = F.embedding_bag(
            step.key_rows(heads, width), self.keys.flatten(0, 3), mode="sum", per_sample_weights=weights
        )
        return summed.view(step.blocks, *q.shape[:2], _BLOCK).permute(1, 2, 0, 3).flatten(2)[..., : step.length]

    def _mix(self, step: _Step, weights: Float[Tensor, "R H L"]) -> Float[Tensor, "R H K"]:
        """Each head's values, weighted and summed in float32."""
        rows = step.value_rows(self.values.shape[1], self.values.shape[2])
        summed = F.embedding_bag(rows, self.values.flatten(0, 2), mode="sum", per_sample_weights=weights.flatten(0, 1))
        return summed.view(*weights.shape[:2], -1)


class _Step:
    """The slots that take a step, and where their rows are in the tables. Layers share it."""

    def __init__(self, slots: Int[Tensor, " R"], positions: Int[Tensor, " R"], num_slots: int) -> None:
        self.slots, self.positions = slots, positions
        self._num_slots = num_slots
        self._rows: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def length(self) -> int:
        """Positions that the longest sequence attends to."""
        return int(self.positions.max()) + 1

    @property
    def blocks(self) -> int:
        """Blocks of keys that hold these positions."""
        return -(-self.length // _BLOCK)

    @cached_property
    def later(self) -> Bool[Tensor, "R L"]:
        """Positions that a sequence has not reached."""
        return torch.arange(self.length) > self.positions[:, None]

    def key_rows(self, heads: int, width: int) -> Int[Tensor, "rows K"]:
        """Indices of each head's rows of keys in a table (M * S * H * K, block)."""
        if (key := (heads, width)) not in self._rows:
            before = torch.arange(self.blocks)[:, None] * self._num_slots + self.slots
            before = before[..., None] * heads + torch.arange(heads)
            self._rows[key] = (before.view(-1, 1) * width + torch.arange(width)).int()
        return self._rows[key]

    def value_rows(self, heads: int, height: int) -> Int[Tensor, "rows L"]:
        """Indices of each head's first L rows of values in a table (S * H * height, K)."""
        if (key := (heads, height, self.length)) not in self._rows:
            before = self.slots[:, None] * heads + torch.arange(heads)
            self._rows[key] = (before.view(-1, 1) * height + torch.arange(self.length)).int()
        return self._rows[key]
