"""Devices that a run can be planned for: memory, peak rates, bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

GB = 1e9
_TERA = 1e12
CPU = "cpu"
_PRODUCT = 1024  # rows and columns of the measured matrix product: past the caches' small sizes, milliseconds long
_COPIED = 1 << 26  # bytes of the measured copy: larger than any cache
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device.

    Attributes:
        name: Name on the command line.
        memory: Memory in bytes.
        bfloat16: Peak rate of dense bfloat16 matrix products, FLOP/s.
        float32: Peak rate of float32 matrix products without TF32, FLOP/s.
        bandwidth: Bandwidth of the memory, bytes/s.
        launch_s: Time to start an operation.
        cores: CPU cores of the host for each device.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    launch_s: float
    cores: float

    def rate(self, precision: str) -> float:
        """Peak rate of matrix products in a precision of the settings, FLOP/s."""
        return self.bfloat16 if precision == "bfloat16" else self.float32

    @property
    def is_cpu(self) -> bool:
        """Whether models run on the CPU, in the memory of the host."""
        return self.name == CPU


def _gpu(name: str, memory_gb: float, bfloat16: float, float32: float, bandwidth_tb: float) -> Card:
    return Card(
        name=name,
        memory=memory_gb * GB,
        bfloat16=bfloat16 * _TERA,
        float32=float32 * _TERA,
        bandwidth=bandwidth_tb * _TERA,
        launch_s=5e-6,
        cores=8,
    )


# Data sheets of NVIDIA; rates in TFLOP/s without sparsity, of the SXM module where there is one.
GPUS: dict[str, Card] = {
    card.name: card
    for card in (
        _gpu("a100-40", 40, 312, 19.5, 1.555),
        _gpu("a100-80", 80, 312, 19.5, 2.039),
        _gpu("h100", 80, 989, 67, 3.35),
        _gpu("h200", 141, 989, 67, 4.8),
        _gpu("b200", 180, 2250, 75, 7.7),
        _gpu("l40s", 48, 362, 91.6, 0.864),
        _gpu("rtx4090", 24, 165, 82.6, 1.008),
    )
}
NAMES = (CPU, *GPUS)


def find_card(name: str) -> Card:
    """The card of a name. `cpu` is this machine's CPU, whose rates are measured, which takes a second.

    Raises:
        InputError: There is no such card.
    """
    if name == CPU:
        return measure_cpu()
    if name not in GPUS:
        raise InputError(f"--gpu is {name!r}, expected one of {', '.join(NAMES)}")
    return GPUS[name]


def measure_cpu() -> Card:
    """This machine's CPU, with the rates of a matrix product and of a copy measured on all its cores."""
    import torch

    from pipeline.machine import available_memory
    from stages.runtime.cores import available_cores

    cores = available_cores()
    torch.set_num_threads(cores)
    block = torch.empty(_COPIED, dtype=torch.uint8)
    copied = 2 * _COPIED / _best(lambda: block.clone())
    return Card(
        name=CPU,
        memory=available_memory(),
        bfloat16=product_rate(torch.bfloat16, _PRODUCT // 2),
        float32=product_rate(torch.float32, _PRODUCT),
        bandwidth=copied,
        launch_s=20e-6,
        cores=cores,
    )


def product_rate(dtype: torch.dtype, size: int) -> float:
    """Measured rate of a square matrix product on the CPU, FLOP/s: the best of a few."""
    import torch

    left = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _best(lambda: left @ left)


def _best(work: Callable[[], object]) -> float:
    """Shortest of a few runs after a first one, seconds: other work on the machine only adds time."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
