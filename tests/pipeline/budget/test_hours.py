"""Times and limits of work on cards with round numbers."""

from __future__ import annotations

from typing import get_args

import pytest

from pipeline.budget.cards import Card, find_card
from pipeline.budget.hours import MFU, Efficiency, seconds_of
from pipeline.budget.phases import Kind, Phase, Work
from stages.runtime.errors import InputError

CARD = Card(name="round", memory=1e10, bfloat16=1e14, float32=1e13, bandwidth=1e12, launch_s=1e-5, cores=8)
FULL = Efficiency(dict.fromkeys([(kind, name) for kind in get_args(Kind) for name in ("bfloat16", "float32")], 1.0))


def seconds(work: Work, devices: int = 1) -> tuple[float, str]:
    """Time beyond the start of the processes, and the limit."""
    start = seconds_of(Work(images=0), CARD, devices, FULL).seconds
    found = seconds_of(work, CARD, devices, FULL)
    return found.seconds - start, found.name


def phase(kind: Kind, flops: float, *, calls: float = 0, launches: float = 0, moved: float = 0) -> Phase:
    return Phase(kind=kind, flops=flops, precision="bfloat16", calls=calls, launches=launches, moved=moved)


def test_training_takes_its_products_or_its_launches() -> None:
    assert seconds(Work(images=1, phases=(phase("training", 1e16, calls=100, launches=100),))) == (100, "products")
    found, limit = seconds(Work(images=1, phases=(phase("training", 1e16, calls=1e6, launches=100),)))
    assert (found, limit) == (pytest.approx(1000), "launches")


def test_sampling_adds_launches_to_the_larger_of_products_and_memory() -> None:
    step = {"calls": 1000, "launches": 1000}
    assert seconds(Work(images=1, phases=(phase("sampling", 2e15, moved=1e9, **step),))) == (
        pytest.approx(30),
        "products",
    )
    found = seconds(Work(images=1, phases=(phase("sampling", 2e14, moved=3e10, **step),)))
    assert found == (pytest.approx(40), "bandwidth")
    found = seconds(Work(images=1, phases=(phase("sampling", 2e14, moved=1e9, **step),)))
    assert found == (pytest.approx(12), "launches")


def test_precision_decides_the_rate() -> None:
    slow = Phase(kind="forward", flops=1e15, precision="float32")
    assert seconds(Work(images=1, phases=(slow,))) == (100, "products")


def test_the_host_works_beside_the_devices_and_serial_work_before_or_after_them() -> None:
    device = phase("convolution", 1e16)
    assert seconds(Work(images=1, phases=(device,), host_s=400)) == (100, "products")
    assert seconds(Work(images=1, phases=(device,), host_s=1600)) == (200, "host")
    assert seconds(Work(images=1, phases=(device,), host_s=1200), devices=2) == (100, "products")
    assert seconds(Work(images=1, phases=(device,), serial_s=300)) == (400, "host")


def test_a_share_given_replaces_that_of_training_and_forward_passes() -> None:
    known, given = Efficiency.of(find_card("h100"), None), Efficiency.of(find_card("h100"), 0.5)
    assert known.shares["training", "bfloat16"] == MFU
    assert given.shares["training", "bfloat16"] == given.shares["forward", "float32"] == 0.5
    assert given.shares["convolution", "bfloat16"] == known.shares["convolution", "bfloat16"]


def test_an_unknown_card_is_a_user_error() -> None:
    with pytest.raises(InputError, match="--gpu is 'v100', expected one of cpu, a100-40, a100-80, h100"):
        find_card("v100")
