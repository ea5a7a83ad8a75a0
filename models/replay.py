"""Ticks of a sampler on a GPU: launched as CUDA graphs, and counted one tick late, so that the GPU never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

_PLAIN_CALLS = 3  # before the capture: they allocate caches and compile kernels


class Replay:
    """A function that works on the same tensors at every call, launched as one CUDA graph after its first calls."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call the function, or replay it."""
        self._calls += 1
        if self._calls <= _PLAIN_CALLS:
            self._function()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records the calls and runs none of them
                self._function()
        self._graph.replay()


class LateCounts:
    """Counts on a GPU as they were before the latest tick. Their copies are in flight while that tick runs."""

    def __init__(self, counts: Int[Tensor, " n"]) -> None:
        self._counts = counts
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.copy()

    def copy(self) -> None:
        """Begin to copy the counts, after a tick."""
        host = torch.empty(self._counts.shape, dtype=self._counts.dtype, pin_memory=True)
        host.copy_(self._counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copies.append((host, event))

    def read(self) -> list[int]:
        """The counts before the latest tick; the first ones at first."""
        while len(self._copies) > 2:
            self._copies.popleft()
        host, event = self._copies[0]
        event.synchronize()
        return host.tolist()
