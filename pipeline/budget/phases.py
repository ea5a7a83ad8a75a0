"""Work of a stage: images and tokens, phases on the devices, and seconds of the host's CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["training", "forward", "convolution", "sampling"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Work of one kind on each device.

    Attributes:
        kind: Decides the efficiency.
        flops: Floating-point operations of one device.
        precision: Type of the products.
        calls: Steps of one device that follow each other.
        launches: Operations that a step starts.
        moved: Bytes that a step reads from the device's memory: weights and caches.
    """

    kind: Kind
    flops: float
    precision: str
    calls: float = 0
    launches: float = 0
    moved: float = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a stage.

    Attributes:
        images: Images that it processes, counting every epoch and every view.
        tokens: Tokens of these; 0 where it works on pixels alone.
        phases: Work of the devices, one phase after the other.
        host_s: Seconds of one core, while the devices work.
        serial_s: Seconds of one core, while the devices wait.
    """

    images: float
    tokens: float = 0
    phases: tuple[Phase, ...] = ()
    host_s: float = 0
    serial_s: float = 0
