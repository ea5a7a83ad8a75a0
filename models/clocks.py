"""Scheduler of a sampler: each image has its own clock.

Images in flight sit in slots. Each waits for a step of one kind, and each tick runs one batch of those that wait for
the same kind, oldest first. A tick takes the kind with the fullest batch. An image that is finished leaves its slot to
the next one. With twice as many slots as a batch has rows, nearly all batches are full.

All state is in tensors of fixed shapes on the device of the sampler, so that a tick never waits for a GPU and can be
replayed as a CUDA graph. There a batch with too few images is filled up with the spare slot, whose results are not
read. On a CPU the batch is shorter instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

DONE = -1
"""Answer of a step for an image that is finished."""
_EMPTY = -1  # what an empty slot waits for
_PATIENCE = 64  # ticks
_NEVER = torch.iinfo(torch.int64).max


@runtime_checkable  # the test suite checks arguments at run time
class Steps(Protocol):
    """The steps that advance images."""

    kinds: int
    """Number of kinds of steps. An image waits for a step of the last kind first."""

    def step(self, kind: int, slots: Int[Tensor, " R"], images: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """Advance some images. Returns the kind of step that each waits for next, or `DONE`."""


@dataclass
class Usage:
    """What a scheduler has made of its batches.

    Attributes:
        ticks: Batches that ran.
        filled: Mean share of a batch's rows that advanced an image.
        tail: Ticks at the end, when fewer images were in flight than there are slots.
    """

    ticks: int = 0
    filled: float = 0.0
    tail: int = 0

    def add(self, share: float, *, in_tail: bool) -> None:
        """Count a tick."""
        self.filled = (self.filled * self.ticks + share) / (self.ticks + 1)
        self.ticks += 1
        self.tail += in_tail


class Clocks:
    """Slots and what they wait for.

    Attributes:
        images: Number of the image in each slot, (slots + 1,); the number of all images if there is none.
        waiting: How many images wait for each kind of step, (kinds,).
        finished: Whether each image is finished, (images + 1,).
        exact: Whether batches have only rows with an image.
        usage: How full its batches were.
    """

    def __init__(self, num_images: int, slots: int, batch: int, kinds: int, device: torch.device) -> None:
        """All images 0 .. `num_images` - 1 wait; the first ones take the slots."""
        self._num_images, self._batch, self._kinds, self._slots = num_images, batch, kinds, slots
        self.usage = Usage()
        self.exact = device.type == "cpu"
        number = torch.arange(slots + 1, device=device)
        number[-1:].fill_(num_images)
        self.images = number.clamp(max=num_images)
        self._waits = torch.where(self.images < num_images, kinds - 1, _EMPTY)
        self._arrived, self._places = torch.arange(slots + 1, device=device), torch.arange(slots + 1, device=device)
        self._next_image = torch.full((1,), min(slots, num_images), device=device)
        self._next_arrival = torch.full((1,), slots, device=device)
        self._kind_numbers = torch.arange(kinds, device=device)[:, None]
        self._passed_over = [0] * kinds  # ticks since a kind that some image waits for was taken
        self.waiting = (self._waits == self._kind_numbers).sum(dim=1)
        self.finished = torch.zeros(num_images + 1, dtype=torch.bool, device=device)

    def take(self, kind: int) -> Int[Tensor, " R"]:
        """The slots of a batch that waits for this kind of step, those that have waited longest first."""
        arrived = torch.where(self._waits == kind, self._arrived, _NEVER)
        oldest = arrived.topk(min(self._batch, len(arrived)), largest=False)
        if self.exact:
            return oldest.indices[: int(self.waiting[kind])]
        return torch.where(oldest.values < _NEVER, oldest.indices, len(arrived) - 1)

    def put(self, slots: Int[Tensor, " R"], waits: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Take slots back after a step, with what they wait for next. Returns which of their images are finished.

        A finished image makes room for the next one.
        """
        images = self.images[slots]
        done = (waits == DONE) & (images < self._num_images)
        if not self.exact or done.any():
            waits = self._admit(slots, images, done, waits)
        self._waits[slots] = waits
        self._arrived[slots] = self._next_arrival + self._places[: len(slots)]
        self._next_arrival += len(slots)
        torch.sum(self._waits == self._kind_numbers, dim=1, out=self.waiting)
        return done

    def _admit(
        self, slots: Int[Tensor, " R"], images: Int[Tensor, " R"], done: Bool[Tensor, " R"], waits: Int[Tensor, " R"]
    ) -> Int[Tensor, " R"]:
        """Give the slots of finished images to the next ones. Returns what all of the slots wait for."""
        self.finished[images] = self.finished[images] | done
        entered = torch.where(done, self._next_image + done.cumsum(0) - 1, images).clamp(max=self._num_images)
        self.images[slots] = entered
        self._next_image += done.sum()
        waits = torch.where(done, self._kinds - 1, waits)
        return torch.where(entered < self._num_images, waits, _EMPTY)

    def fullest(self, waiting: list[int]) -> int | None:
        """Kind of the next tick, given how many images wait for each kind; None if none waits.

        It is the kind with the fullest batch, the later one of two that are full. A kind that was passed over for long
        comes first, so that images which rarely need a step wait for those of others no longer than that.
        """
        if not any(waiting):
            return None
        found = max(range(self._kinds), key=lambda kind: (self._urgent(kind), min(waiting[kind], self._batch), kind))
        for kind, count in enumerate(waiting):
            self._passed_over[kind] = self._passed_over[kind] + 1 if count and kind != found else 0
        used = min(waiting[found], self._batch)
        self.usage.add(used / self._batch, in_tail=sum(waiting) < self._slots)
        return found

    def _urgent(self, kind: int) -> bool:
        return self._passed_over[kind] >= _PATIENCE
