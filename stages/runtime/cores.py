"""CPU cores and control groups of a process. Imports no torch, as the stages and commands that use only threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, bounded by quotas, shared among the processes of its launch.

    `os.cpu_count()` counts all cores of the machine, whatever a scheduler or a container gives this process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = min([cores, *(int(quota) for quota in _quotas(control_groups()))])
    return max(1, whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def control_groups(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Folders of the control groups of this process and of the groups around them."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = dict[Path, None]()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / controllers.removeprefix("name=") if controllers else root
        inside = base / path.lstrip("/")
        folders |= dict.fromkeys(folder for folder in (inside, *inside.parents) if folder.is_relative_to(base))
    return list(folders)


def _quotas(groups: list[Path]) -> Iterator[float]:
    """CPU quotas in cores, of version 2 and 1 of control groups."""
    for group in groups:
        if (words := words_of(group / "cpu.max")) and words[0] != "max":
            yield int(words[0]) / int(words[1])
        quota, period = words_of(group / "cpu.cfs_quota_us"), words_of(group / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            yield int(quota[0]) / int(period[0])


def words_of(path: Path) -> list[str]:
    """Words of a file of a control group; none if there is no such file."""
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
