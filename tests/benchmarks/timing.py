"""Wall times of contenders that take turns: on a shared machine only their ratios mean something."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, by its name.

    Every round runs each of them once, and each round starts with another one, so that a busy spell of the machine or
    the state in which one leaves the caches falls on all of them. One round before is not measured. The garbage
    collector rests meanwhile.

    Raises:
        ValueError: No contenders or no rounds.
    """
    if not contenders or rounds < 1:
        raise ValueError(f"{len(contenders)} contenders in {rounds} rounds, expected at least one of each")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                contenders[name]()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}
