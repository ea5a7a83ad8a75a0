"""Watch for losses and gradients that are not finite, without a wait for the device in every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stages.runtime.artifact import RECORD, write_json
from stages.runtime.distributed import World, start_max
from stages.training.stream import Part

REPORT = Path(RECORD) / "not_finite.json"
_NONE = 2**62
Samples = Callable[[int, Part], dict[str, list[int]]]
"""Maps a step and places of its global batch to the numbers of the images there, with their epochs and views."""


class FiniteWatch:
    """Remembers, on the device, the first step and place at which a number was not finite.

    Place p is the micro-batch whose first image has place p in the global batch. The place after the last one stands
    for the gradient of the whole batch.
    """

    def __init__(self, global_batch_size: int, micro_batch: int, world: World) -> None:
        self._whole, self._micro_batch, self._world = Part(0, global_batch_size), micro_batch, world
        self._places = global_batch_size + 1
        self._first = torch.full((), _NONE, dtype=torch.int64, device=world.device)

    def see_loss(self, loss: Tensor, step: int, part: Part) -> None:
        """Look at the loss of a micro-batch."""
        self._see(loss, step * self._places + part.first)

    def see_gradient(self, norm: Tensor, step: int) -> None:
        """Look at the norm of a step's gradients."""
        self._see(norm, step * self._places + self._whole.count)

    def require_finite(self, samples: Samples, output: Path) -> None:
        """Wait for the device. If a number was not finite, write its images to the record and stop all processes.

        Raises:
            RuntimeError: A loss or a gradient was not finite. The message names the file.
        """
        first = -start_max([-int(self._first)])()[0]
        if first == _NONE:
            return
        step, place = divmod(first, self._places)
        in_gradient = place == self._whole.count
        part = self._whole if in_gradient else self._micro_batch_at(place)
        what, path = "gradient" if in_gradient else "loss", output / REPORT
        if self._world.is_main:
            write_json(path, {"step": step + 1, "what": what, **samples(step, part)})
        raise RuntimeError(
            f"{what} is not finite at step {step + 1}, its images are in {path}: lower training.learning_rate, "
            "lengthen training.warmup_steps, or look at these images"
        )

    def _see(self, number: Tensor, code: int) -> None:
        self._first = torch.where(number.isfinite(), self._first, self._first.clamp(max=code))

    def _micro_batch_at(self, place: int) -> Part:
        share = self._whole.count // self._world.size
        return Part(place, min(self._micro_batch, share - place % share))
