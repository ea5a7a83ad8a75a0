"""Memory that is free but still held."""

from __future__ import annotations

import ctypes
import sys


def return_free_memory() -> None:
    """Give the allocator's free pages back to the system (Linux).

    Batches of patches have another shape at every step. The heap fragments under them, and a process that lives on one
    gigabyte would come to hold four.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
