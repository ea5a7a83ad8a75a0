"""KV cache: keys and values of earlier positions of images in slots, and attention of one new position of some of them.

With one query per sequence, attention is bound by memory: it reads each key and value once. On a GPU one kernel does
that, see slot_attention.py. On a CPU a slot is cut into pages of positions, and both products are weighted sums of
rows. Scores sum a head's keys, stored channel by channel in each page, weighted by the query. Outputs sum its values,
weighted by the softmax. Torch's `embedding_bag` computes such sums three times as fast as matrix products, and reads
only the pages that a sequence has reached.

Shapes: S slots, R of them take a step; M pages a slot, of `page` positions each; P pages that a step reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from models.layers import Attend
from models.slot_attention import slot_attention, store

_PAGE = 32  # positions: shorter rows of keys are slower to sum, longer pages are read for fewer positions


class KVCache:
    """Keys and values of a stack of layers, for one sequence in each slot.

    Nothing is cleared when a slot gets another sequence: a step reads positions up to its own, which that sequence has
    written. The first call of a layer's `Attend` fixes H, K and the dtype.
    """

    def __init__(self, num_layers: int, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._layers: list[_PagedSums | _OneKernel | None] = [None] * num_layers

    def step(self, slots: Int[Tensor, " R"], positions: Int[Tensor, " R"]) -> Iterator[Attend]:
        """Attention of each layer for one step: the sequence in `slots[i]` takes position `positions[i]`.

        Each `Attend` maps queries, keys and values (R, H, K) of the new positions to attended values (R, H, K).
        """
        step = _Step(slots, positions, self.capacity)
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

    def _layer(self, number: int, like: Tensor) -> _PagedSums | _OneKernel:
        layer = self._layers[number]
        if layer is None:
            kind = _PagedSums if like.device.type == "cpu" else _OneKernel
            layer = self._layers[number] = kind.empty(self.slots, self.capacity, like)
        return layer


@dataclass(frozen=True)
class _OneKernel:
    """Keys and values of one layer on a GPU."""

    keys: Float[Tensor, "S H T K"]
    values: Float[Tensor, "S H T K"]

    @classmethod
    def empty(cls, slots: int, capacity: int, like: Float[Tensor, "*R H K"]) -> _OneKernel:
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
class _PagedSums:
    """Keys and values of one layer on a CPU."""

    keys: Float[Tensor, "S H M K page"]
    values: Float[Tensor, "S H M*page K"]

    @classmethod
    def empty(cls, slots: int, capacity: int, like: Float[Tensor, "*R H K"]) -> _PagedSums:
        """A layer of zeros: masked scores and values must be finite."""
        pages, (heads, width) = _num_pages(capacity), like.shape[-2:]
        return cls(
            keys=like.new_zeros(slots, heads, pages, width, _PAGE),
            values=like.new_zeros(slots, heads, pages * _PAGE, width),
        )

    def write(
        self,
        slots: Int[Tensor, "*#R"],
        positions: Int[Tensor, "*#R"],
        k: Float[Tensor, "*R H K"],
        v: Float[Tensor, "*R H K"],
    ) -> None:
        """Keep keys and values of some positions."""
        self.keys[slots, :, positions // _PAGE, :, positions % _PAGE] = k
        self.values[slots, :, positions] = v

    def attend(
        self, step: _Step, q: Float[Tensor, "R H K"], k: Float[Tensor, "R H K"], v: Float[Tensor, "R H K"]
    ) -> Float[Tensor, "R H K"]:
        """Write the new positions and attend to them and all before, with a float32 softmax."""
        pages = step.pages(*q.shape[1:])
        self.keys.put_(pages.new_keys, k)
        self.values.view(-1, v.shape[-1]).index_copy_(0, pages.new_values, v.flatten(0, 1))
        queries = pages.of_each(q.flatten(0, 1) * q.shape[-1] ** -0.5)
        scores = F.embedding_bag(pages.keys, self.keys.view(-1, _PAGE), mode="sum", per_sample_weights=queries)
        weights = pages.softmax(scores).type_as(q)
        table = self.values.view(-1, v.shape[-1])
        return F.embedding_bag(
            pages.values, table, pages.ends, mode="sum", per_sample_weights=weights, include_last_offset=True
        ).view_as(q)


class _Step:
    """The slots that take a step, and their new positions. The layers of a cache share it."""

    def __init__(self, slots: Int[Tensor, " R"], positions: Int[Tensor, " R"], capacity: int) -> None:
        self.slots, self.positions = slots, positions
        self._capacity = capacity
        self._pages: _Pages | None = None

    def pages(self, heads: int, width: int) -> _Pages:
        """What the step reads on a CPU."""
        if self._pages is None:
            slots, positions = self.slots.numpy(), self.positions.numpy()
            self._pages = _Pages(slots, positions, heads, width, _num_pages(self._capacity))
        return self._pages


class _Pages:
    """The pages that each head reads in a step, row by row, head by head: P of them. Indices are of rows of tables.

    NumPy computes them: at this size its calls take a tenth of the time of torch's.

    Attributes:
        keys: Rows of keys of each page, (P, K).
        values: Rows of values of all pages, (P * page,).
        ends: Where the values of each row and head begin, and where the last ones end, (R * H + 1,).
        new_keys: Elements of the keys of the new positions, (R * H * K,).
        new_values: Rows of the values of the new positions, (R * H,).
    """

    def __init__(
        self,
        slots: Int64[NDArray[np.int64], " R"],
        positions: Int64[NDArray[np.int64], " R"],
        heads: int,
        width: int,
        pages_of_slot: int,
    ) -> None:
        last, places = np.divmod(positions, _PAGE)
        most = int(last.max()) + 1  # pages of a row
        counts = np.repeat(last + 1, heads)  # of each row and head
        ends = np.concatenate([[0], counts.cumsum()])
        owners = np.repeat(np.arange(len(counts)), counts)  # row and head of each page
        numbers = np.arange(len(owners)) - ends[owners]
        first = ((slots[:, None] * heads + np.arange(heads)) * pages_of_slot).ravel()
        pages = (first[owners] + numbers).astype(np.int32)[:, None]
        self.keys = torch.from_numpy(pages * width + np.arange(width, dtype=np.int32))
        self.values = torch.from_numpy((pages * _PAGE + np.arange(_PAGE, dtype=np.int32)).ravel())
        self.ends = torch.from_numpy((ends * _PAGE).astype(np.int32))
        new, place = first + np.repeat(last, heads), np.repeat(places, heads)
        self.new_keys = torch.from_numpy(((new[:, None] * width + np.arange(width)) * _PAGE + place[:, None]).ravel())
        self.new_values = torch.from_numpy(new * _PAGE + place)
        later = np.where(np.arange(_PAGE) > place[:, None], -np.inf, 0.0).astype(np.float32)
        self._last, self._later = torch.from_numpy(ends[1:] - 1), torch.from_numpy(later)  # pages, what hides scores
        self._owners, self._places = torch.from_numpy(owners), torch.from_numpy(owners * most + numbers)
        self._shape = len(counts), most  # of a table of all pages

    def of_each(self, rows: Float[Tensor, " RH *K"]) -> Float[Tensor, " P *K"]:
        """What belongs to the row and head of each page."""
        return rows.index_select(0, self._owners)

    def softmax(self, scores: Float[Tensor, "P page"]) -> Float[Tensor, " P*page"]:
        """Softmax of each row and head over all its pages, float32."""
        scores = scores.float().index_add_(0, self._last, self._later)
        if len(scores) == self._shape[0] * self._shape[1]:
            return scores.view(self._shape[0], -1).softmax(dim=-1).flatten()
        highest = torch.full(self._shape, -torch.inf).put_(self._places, scores.amax(dim=-1)).amax(dim=-1)
        weights = (scores - self.of_each(highest)[:, None]).exp_()
        sums = torch.zeros(self._shape[0]).index_add_(0, self._owners, weights.sum(dim=-1))
        return weights.div_(self.of_each(sums)[:, None]).flatten()


def _num_pages(capacity: int) -> int:
    return -(-capacity // _PAGE)
