"""The heap of a training, kept at about the size that it has after its first steps (Linux).

Batches of patches change their shape at every step. This fragments the heap: a process that needs one gigabyte grows to
four. Pages that are given back cost time when they are needed again, so they are kept until the process has grown.
"""

from __future__ import annotations

import ctypes
import sys

import psutil

_GROWTH = 1.25


class Heap:
    """The size that this process usually has, and what it may grow to."""

    def __init__(self) -> None:
        self._usual: int | None = None

    def trim(self) -> None:
        """Return the allocator's free pages to the system if the process has grown. Call it between steps."""
        if sys.platform != "linux":
            return
        if self._usual is None:
            self._usual = _resident()
        elif _resident() > _GROWTH * self._usual:
            ctypes.CDLL(None).malloc_trim(0)
            self._usual = max(self._usual, _resident())  # what is left is in use


def _resident() -> int:
    """Bytes of memory that this process holds."""
    size: int = psutil.Process().memory_info().rss
    return size
