"""Who holds a lock: process and host, written into the lock's file, for those who wait."""

from __future__ import annotations

import contextlib
import os
import socket

_LONGEST = 300  # bytes


def write_holder(descriptor: int) -> None:
    """Write this process into a locked file. On a full disk the file says nothing, and the lock holds all the same."""
    text = f"{os.getpid()} {socket.gethostname()}"
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def read_holder(descriptor: int) -> str:
    """The process that holds a lock: `process 4711 on node7`.

    A child keeps the lock of its parent, so that the process in the file may have ended.
    """
    try:
        number, host = os.pread(descriptor, _LONGEST, 0).decode().split()
        pid = int(number)
    except (OSError, ValueError):  # not written yet, or by an older version
        return "another process"
    import psutil  # only those who wait need it

    ended = host == socket.gethostname() and not psutil.pid_exists(pid)
    return f"a child of process {pid} on {host}, which has ended," if ended else f"process {pid} on {host}"
