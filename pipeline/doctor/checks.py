"""All checks of `dpar doctor`, run at the same time: most of them wait for a child process or for the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil

from conf.runtime import RuntimeConfig
from pipeline import machine
from pipeline.doctor import cpu, gpu, home, network, presets, software
from pipeline.doctor.devices import torch_facts
from pipeline.doctor.finding import Finding
from stages.runtime.cores import available_cores

_SHARED = Path("/dev/shm")
Check = Callable[[], Finding | Iterable[Finding]]


def examine(runtime: RuntimeConfig) -> list[Finding]:
    """Findings of all checks, in the order in which they are shown."""
    memory = machine.available_memory()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(torch_facts)  # the longest
        alone: list[Check] = [
            software.check_python,
            software.check_packages,
            lambda: cpu.check_cores(available_cores(), os.cpu_count() or 1, runtime),
            lambda: cpu.check_memory(memory, psutil.virtual_memory().available),
            lambda: home.check_home(runtime.home),
            lambda: network.check_host_name(socket.gethostname(), runtime),
            lambda: network.check_slurm(runtime),
            network.check_proxies,
            lambda: network.check_ports(runtime),
        ]
        begun: list[Future[list[Finding]]] = [pool.submit(_listed, check) for check in alone]
        facts = asked.result()
        on_torch: list[Check] = [
            lambda: cpu.check_torch(facts),
            lambda: cpu.check_bfloat16(facts, machine.bfloat16_flags()),
            lambda: gpu.check_cuda(facts, runtime, gpu.driver_version(), has_device=machine.has_nvidia_device()),
            lambda: cpu.check_shared_memory(_size_of(_SHARED), facts),
            lambda: cpu.check_compiler(runtime, facts),
            lambda: presets.check_presets(facts, memory, runtime.processes),
        ]
        found = [finding for future in begun for finding in future.result()]
        return found + [finding for check in on_torch for finding in _listed(check)]


def _listed(check: Check) -> list[Finding]:
    found = check()
    return [found] if isinstance(found, Finding) else list(found)


def _size_of(folder: Path) -> int | None:
    return psutil.disk_usage(str(folder)).total if folder.is_dir() else None
