"""Work ahead of need: in order, bounded, overlapping, and over when its user is."""

import threading
from itertools import count, islice

import pytest

from stages.runtime.prefetch import prefetch


def test_results_come_in_order_whatever_finishes_first() -> None:
    finished = [threading.Event() for _ in range(3)]

    def later_first(number: int) -> int:
        if number < 2:
            assert finished[number + 1].wait(10)
        finished[number].set()
        return number * number

    with prefetch(later_first, range(3), threads=3, depth=3) as results:
        assert list(results) == [0, 1, 4]


def test_no_more_than_the_depth_is_taken_ahead_of_an_endless_source() -> None:
    taken: list[int] = []
    source = (taken.append(number) or number for number in count())  # type: ignore[func-returns-value]
    with prefetch(lambda number: number, source, threads=2, depth=5) as results:
        for used in range(1, 20):
            next(results)
            assert len(taken) == used + 5
    assert len(taken) == 24


def test_work_goes_on_while_a_result_is_used() -> None:
    second = threading.Event()
    with prefetch(lambda number: number and second.set(), range(2), threads=1, depth=2) as results:
        next(results)
        assert second.wait(10)  # the second was computed although nobody has asked for it


def test_an_error_comes_where_its_result_is_asked_for_and_stops_what_follows() -> None:
    started: list[int] = []

    def fails(number: int) -> float:
        started.append(number)
        return 1 / (number - 2)

    results = []
    with pytest.raises(ZeroDivisionError), prefetch(fails, range(1000), threads=1, depth=4) as stream:
        results.extend(stream)
    assert results == [] or results == [-0.5, -1.0]
    assert len(started) <= 7


def test_leaving_early_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    with prefetch(lambda number: number, range(1000), threads=4, depth=8) as results:
        assert list(islice(results, 3)) == [0, 1, 2]
    assert threading.active_count() == before


def test_no_items_give_no_results() -> None:
    with prefetch(lambda number: number, range(0), threads=2, depth=3) as results:
        assert list(results) == []
