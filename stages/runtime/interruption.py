"""Requests to stop and to save while a stage trains: from signals and from the clock, agreed by all processes.

SIGTERM ends every other stage at once. In training, SIGTERM and SIGUSR1 (which job schedulers send before a time limit)
ask for a checkpoint first. All processes must stop after the same step. Each brings its own request to every step, and
the largest decides. The exchange of a step runs beside the next step, so several processes stop one step later than
one process does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from stages.runtime.distributed import World, start_max

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Agreed(NamedTuple):
    """What all processes do after this step."""

    stop: int
    """Number of the signal that asks for a stop; 0 if there is none."""
    save: bool
    """Whether a checkpoint is due by the clock of rank 0."""


class Interruption:
    """Collects requests. Inside the context, SIGTERM and SIGUSR1 are requests and do not end the process.

    Signals can be caught in the main thread only. In other threads, only the clock makes requests.
    """

    def __init__(self, world: World, save_minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._save_s, self._clock = world, 60 * save_minutes, clock
        self._last_save, self._asked = clock(), False
        self._signal = 0
        self._pending: Callable[[], list[int]] | None = None

    def saved(self) -> None:
        """A checkpoint was written: the next one is due `save_minutes` from now."""
        self._last_save, self._asked = self._clock(), False

    def agree(self) -> Agreed:
        """Requests that all processes know of. All processes must call this after every step."""
        due = self._world.is_main and not self._asked and self._clock() - self._last_save >= self._save_s
        self._asked |= due
        latest = start_max((self._signal, int(due)))
        if self._world.size == 1:
            stop, save = latest()
        else:
            stop, save = (0, 0) if self._pending is None else self._pending()
            self._pending = latest
        return Agreed(stop, bool(save))

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Context in which signals are requests."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._request) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
