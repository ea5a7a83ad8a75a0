"""The CPU cores of a process. Imports no torch, as the stages and commands that use only threads."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores that this process may use: those of its affinity, shared among the processes on this machine.

    `os.cpu_count()` counts all cores of the machine, whatever a scheduler or a container gives this process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
