"""Time of a stage's work on a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.budget.cards import Card
from pipeline.budget.phases import Kind, Phase, Work

MFU = 0.35  # share of a GPU's peak that training reaches: an assumption; eager steps are computed to reach about 0.25
# Shares that convolutions reach on a GPU; assumptions. In bfloat16 they are bound by memory: VQ-16 decodes 126 GMACs in
# about 2 ms of an H100, by its bytes and operations.
_CONVOLUTIONS = {"bfloat16": 0.13, "float32": 0.5}
# Shares of a measured matrix product that a CPU reaches, calibrated on the demo (see `pipeline.budget.check`):
# entropy_model and train (training), entropy_map (forward), tokenizer and tokenize (convolution), sample (sampling).
_CPU: dict[Kind, float] = {"training": 0.5, "forward": 0.45, "convolution": 0.27, "sampling": 0.32}
_START_S = 4.0  # start of a stage's process, and imports; calibrated on the demo's dataset and patch_index


class Limit(NamedTuple):
    """A time and what limits it, in one word."""

    seconds: float
    name: str


@dataclass(frozen=True)
class Efficiency:
    """Shares of a card's peak rate that work reaches, by kind and precision."""

    shares: Mapping[tuple[Kind, str], float]

    @classmethod
    def of(cls, card: Card, mfu: float | None) -> Efficiency:
        """Shares on a card; `mfu` replaces the share of training and of whole forward passes."""
        shares = dict[tuple[Kind, str], float]()
        for precision in _CONVOLUTIONS:
            known = _CPU if card.is_cpu else dict.fromkeys(_CPU, MFU) | {"convolution": _CONVOLUTIONS[precision]}
            if mfu is not None:
                known = known | {"training": mfu, "forward": mfu}
            shares |= {(kind, precision): share for kind, share in known.items()}
        return cls(shares)


def seconds_of(work: Work, card: Card, devices: int, efficiency: Efficiency) -> Limit:
    """Time of a stage with all its devices, and what limits it: `start`, `host`, or the limit of its longest phase."""
    phases = [_phase(phase, card, efficiency) for phase in work.phases]
    host = Limit(work.host_s / host_cores(card, devices), "host")
    device = sum(phase.seconds for phase in phases)
    longest = [Limit(_START_S, "start"), Limit(work.serial_s, "host"), *(phases if device > host.seconds else [host])]
    total = _START_S + work.serial_s + max(device, host.seconds)
    return Limit(total, max(longest).name)


def host_cores(card: Card, devices: int) -> float:
    """CPU cores of the host: those of the CPU, or those of all devices."""
    return card.cores * (1 if card.is_cpu else devices)


def _phase(phase: Phase, card: Card, efficiency: Efficiency) -> Limit:
    """Time of a phase. Steps of the sampler do one thing after the other; other kinds of work overlap."""
    products = phase.flops / (card.rate(phase.precision) * efficiency.shares[phase.kind, phase.precision])
    launches = phase.calls * phase.launches * card.launch_s
    if phase.kind != "sampling":
        return max(Limit(products, "products"), Limit(launches, "launches"))
    moved = phase.calls * phase.moved / card.bandwidth
    work = max(Limit(products, "products"), Limit(moved, "bandwidth"))
    return Limit(launches + work.seconds, max(work, Limit(launches, "launches")).name)
