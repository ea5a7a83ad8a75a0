"""Memory map of many files of one size as one array, so that one index reaches any row of any file.

A large store has thousands of files. A separate mapping for each would cost a Python object and an open file
descriptor per file, and a loop over files for every batch.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_MAP_FIXED = 0x10  # the value on Linux and macOS; the module mmap does not define it
_MADV_POPULATE_READ = 22
_FAILED = ctypes.c_void_p(-1).value


class SideBySide:
    """Read-only rows of `num_files` files. File i starts at row i * `pitch`.

    Every file starts at a page boundary and at a whole row, so the pitch may exceed the number of rows in a file. The
    rows of a file are followed by its `tail` bytes, then by zeros.
    """

    def __init__(
        self, num_files: int, rows: int, row_shape: tuple[int, ...], dtype: DTypeLike, *, tail: int = 0
    ) -> None:
        """Reserve addresses. This uses no memory."""
        self._dtype, self._row_shape = np.dtype(dtype), row_shape
        row_bytes = math.prod(row_shape) * self._dtype.itemsize
        step = math.lcm(mmap.PAGESIZE, row_bytes)
        self._bytes = rows * row_bytes + tail
        self._stride = -(-self._bytes // step) * step
        self.pitch = self._stride // row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        # Freeing this mapping also frees the file mappings over it.
        self._memory = mmap.mmap(-1, num_files * self._stride, flags=flags, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data

    def lay(self, place: int, path: Path, wanted: int) -> int | None:
        """Map file number `place` if its size is `wanted` bytes. Returns its size, or None if it does not exist.

        Raises:
            OSError: The file cannot be opened or mapped.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor).st_size
            if found == wanted:
                self._map(self._address + place * self._stride, descriptor, path)
        finally:
            os.close(descriptor)
        return found

    def rows(self) -> NDArray[Any]:
        """All rows, (files * pitch, *row shape). The array keeps the mapping alive."""
        flat = np.frombuffer(self._memory, self._dtype)
        return flat.reshape(-1, *self._row_shape)

    def file(self, place: int) -> NDArray[np.uint8]:
        """Bytes of file number `place`, rows and tail, read into memory. The array keeps the mapping alive.

        On Linux 5.14 and later, other threads run while the disk is read, and a read failure is an error. Elsewhere, a
        read failure ends the process with SIGBUS.

        Raises:
            OSError: The file was truncated after it was mapped, or the disk cannot read it.
        """
        if sys.platform == "linux" and _LIBC.madvise(
            self._address + place * self._stride, self._bytes, _MADV_POPULATE_READ
        ):
            error = ctypes.get_errno()
            if error != errno.EINVAL:  # a kernel before Linux 5.14
                raise OSError(error, "it was cut, or the disk is faulty")
        return np.frombuffer(self._memory, np.uint8, self._bytes, place * self._stride)

    def _map(self, address: int, descriptor: int, path: Path) -> None:
        found = _LIBC.mmap(address, self._bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        if found == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"{os.strerror(error)}: cannot be mapped into memory", str(path))


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


_LIBC = _libc()
