"""Speed of training: images, tokens and patches a second, use of the device, memory, and waiting for data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import psutil
import torch

from stages.runtime.distributed import World

Item = TypeVar("Item")
MEASURED = frozenset(
    ("images_per_second", "tokens_per_second", "patches_per_second", "mfu", "memory_gb", "waiting_for_data")
)
"""Names of the metrics that depend on the machine."""
_TRAINING = 3  # the backward pass of a product is two products of its size
_SIDES = {"cuda": 8192, "cpu": 768}  # large enough for the full rate, small enough for a few milliseconds
_REPEATS = 5


class Meter:
    """Measures the time between two reports, without the time inside `paused`.

    `mfu` (model FLOPs utilisation) is the share of the device's rate of matrix products, measured at the start, that
    the products of the model reach. Products that are computed again in the backward pass do not count.
    """

    def __init__(self, world: World, peak: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._world, self._peak, self._clock = world, peak, clock
        self._began, self._waited = clock(), 0.0

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items; the time that each takes to come is counted as waiting for data."""
        while True:
            began = self._clock()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited += self._clock() - began
            yield item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count: checkpoints, held-out losses, previews."""
        began = self._clock()
        try:
            yield
        finally:
            self._began += self._clock() - began

    def report(self, counts: Mapping[str, float], macs: float | None) -> dict[str, float]:
        """Metrics since the last report.

        Args:
            counts: Images, tokens and patches since then, by name, in the mean of the processes.
            macs: MACs of one image's forward pass; None where they are unknown.
        """
        now = self._clock()
        elapsed, self._began = max(now - self._began, 1e-9), now
        waited, self._waited = self._waited, 0.0
        rates = {f"{name}_per_second": self._world.size * count / elapsed for name, count in counts.items()}
        found = rates | {"memory_gb": memory_bytes(self._world.device) / 1e9, "waiting_for_data": waited / elapsed}
        if macs is not None and self._peak is not None:
            found["mfu"] = 2 * _TRAINING * macs * counts["images"] / elapsed / self._peak
        return found


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: the median of a few."""
    side = _SIDES[device.type]
    factors = torch.ones(2, side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        torch.mm(factors[0], factors[1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds)


def memory_bytes(device: torch.device) -> int:
    """The most that tensors ever took on a GPU; on a CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found: int = psutil.Process().memory_info().rss
    return found
