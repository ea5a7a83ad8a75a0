"""What this machine offers a process: cores, memory, instructions of the CPU, NVIDIA devices. Nothing imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f")  # oneDNN has fast bfloat16 kernels for each of them


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, bounded by the quota of its control groups."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in _quotas(_control_groups()))]))


def available_memory() -> int:
    """Memory that this process may use, bytes: that of the machine, bounded by the limits of its control groups."""
    return min([psutil.virtual_memory().total, *_memory_limits(_control_groups())])


def bfloat16_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Instruction sets of this CPU that make bfloat16 matrix products fast. Without any they are emulated."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in _BFLOAT16_FLAGS if name in flags]


def has_nvidia_device(devices: Path = Path("/dev")) -> bool:
    """Whether an NVIDIA driver shows a device to this process (/dev/nvidia0; /dev/dxg under Windows)."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def _control_groups(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
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
        if (words := _words(group / "cpu.max")) and words[0] != "max":
            yield int(words[0]) / int(words[1])
        quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            yield int(quota[0]) / int(period[0])


def _memory_limits(groups: list[Path]) -> Iterator[int]:
    """Memory limits in bytes, of version 2 and 1 of control groups. Version 1 writes a huge number for none."""
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (words := _words(group / name)) and words[0] != "max":
                yield int(words[0])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
