"""What this machine offers a process: memory, instructions of the CPU, NVIDIA devices. Nothing imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from stages.runtime.cores import control_groups, words_of

_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f")  # oneDNN has fast bfloat16 kernels for each of them


def available_memory() -> int:
    """Memory that this process may use, bytes: that of the machine, bounded by the limits of its control groups."""
    return min([psutil.virtual_memory().total, *_memory_limits(control_groups())])


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


def _memory_limits(groups: list[Path]) -> Iterator[int]:
    """Memory limits in bytes, of version 2 and 1 of control groups. Version 1 writes a huge number for none."""
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (words := words_of(group / name)) and words[0] != "max":
                yield int(words[0])
