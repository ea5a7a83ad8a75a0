"""A clock that is moved by hand."""

from __future__ import annotations


class HandClock:
    """Stands for `time.monotonic`: it shows `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
