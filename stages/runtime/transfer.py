"""Copies between the CPU and the device of a model, beside its work: the host waits only for results that it reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Item = TypeVar("Item")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. On a GPU the copy is asynchronous, from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Download:
    """A tensor on its way to the CPU. The copy of a GPU's tensor starts at once and into pinned memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> NDArray[np.generic]:
        """The values. Waits for the copy, not for work that the device was given since."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()


def one_behind(started: Iterable[Item]) -> Iterator[Item]:
    """The same items, each once the next one is made: a GPU then has its next task before the host reads a result."""
    waiting = deque[Item]()
    for item in started:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
