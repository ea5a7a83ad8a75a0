"""Requests from signals and from the clock: each is seen once, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from hand_clock import HandClock

from stages.runtime import interruption
from stages.runtime.distributed import World
from stages.runtime.interruption import SIGNALS, Agreed, Interruption

CPU = torch.device("cpu")
NOTHING = Agreed(0, False)


def test_a_checkpoint_is_due_by_the_clock_and_again_after_the_same_time() -> None:
    clock = HandClock()
    requests = Interruption(World(0, 1, CPU), 15, clock)
    due = []
    for minute in range(50):
        clock.now = 60.0 * minute
        if requests.agree().save:
            due.append(minute)
            requests.saved()
    assert due == [15, 30, 45]


def test_a_checkpoint_at_an_interval_puts_off_the_one_by_the_clock() -> None:
    clock = HandClock()
    requests = Interruption(World(0, 1, CPU), 15, clock)
    clock.now = 60.0 * 14
    requests.saved()
    clock.now = 60.0 * 28
    assert requests.agree() == NOTHING
    clock.now = 60.0 * 29
    assert requests.agree() == Agreed(0, True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_inside_the_context_only(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    requests = Interruption(World(0, 1, CPU), 15)
    with requests.caught():
        assert requests.agree() == NOTHING
        os.kill(os.getpid(), number)
        assert requests.agree() == Agreed(number, False)
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_in_another_thread_only_the_clock_asks() -> None:
    seen: list[object] = []

    def work() -> None:
        requests = Interruption(World(0, 1, CPU), 15)
        with requests.caught():
            seen.append(requests.agree())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [NOTHING]


def test_several_processes_act_on_the_exchange_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process, rank 1, gets SIGTERM in the third step; the clock of rank 0 rings in the first."""
    others = iter([(0, 0), (0, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 0)])

    def start_max(values: tuple[int, int]) -> Callable[[], list[int]]:
        other = next(others)
        return lambda: [max(one, two) for one, two in zip(values, other, strict=True)]

    monkeypatch.setattr(interruption, "start_max", start_max)
    clock = HandClock()
    requests = Interruption(World(0, 2, CPU), 15, clock)
    clock.now = 60.0 * 15
    agreed = []
    for _ in range(4):
        agreed.append(requests.agree())
        if agreed[-1].save:
            requests.saved()
    assert agreed == [NOTHING, Agreed(0, True), NOTHING, Agreed(signal.SIGTERM, False)]


def test_the_clock_of_other_ranks_asks_for_nothing() -> None:
    clock = HandClock()
    requests = Interruption(World(1, 1, CPU), 15, clock)
    clock.now = 60.0 * 100
    assert requests.agree() == NOTHING
