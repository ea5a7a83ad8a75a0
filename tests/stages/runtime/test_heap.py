"""Free pages of a training."""

from __future__ import annotations

import sys

import psutil
import pytest

from stages.runtime.heap import Heap


@pytest.mark.skipif(sys.platform != "linux", reason="needs malloc_trim")
def test_free_pages_are_kept_until_the_heap_has_grown() -> None:
    def holding(pieces: int) -> int:
        """Allocate small pieces, free them all but the last, and return the bytes that are left."""
        held = [bytearray(100_000) for _ in range(pieces)]
        del held[:-1]
        heap.trim()
        return psutil.Process().memory_info().rss

    heap, before = Heap(), psutil.Process().memory_info().rss
    usual = holding(100)
    grown = holding(before // 100_000)
    assert grown < 1.1 * usual
