"""Checks of CUDA: driver, devices, bfloat16, packed attention."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from conf.runtime import RuntimeConfig
from pipeline.doctor.devices import Device, TorchFacts
from pipeline.doctor.finding import Finding, blocker, ok, warning
from pipeline.text import size

_DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}  # by major version of CUDA, for its minor versions together
_OPERATORS = "install the versions of constraints.txt, or run with fewer tokens: padding wastes time and memory"


def check_cuda(facts: TorchFacts, runtime: RuntimeConfig, driver: str | None, *, has_device: bool) -> Iterator[Finding]:
    """Findings on CUDA and on each device.

    Args:
        facts: What torch sees.
        runtime: Runtime settings: the device and the number of processes.
        driver: Version of the driver; None if none is loaded.
        has_device: Whether the system shows a device to this process.
    """
    if not facts.devices:
        yield _no_device(facts, runtime, driver, has_device=has_device)
        return
    number = len(facts.devices)
    yield ok("cuda", f"CUDA {facts.cuda}, driver {driver or 'unknown'}, {number} device{'s' if number > 1 else ''}")
    if runtime.device == "cpu":
        yield warning("device", "runtime.device is cpu", "set DPAR_DEVICE=auto to use the GPU")
    elif runtime.launcher == "local":
        yield from _processes(runtime.processes, number)
    for place, device in enumerate(facts.devices):
        yield from _device(f"cuda:{place}", device)


def _processes(processes: int, devices: int) -> Iterator[Finding]:
    """Whether each device has one process."""
    found, advice = f"runtime.processes is {processes}, and torch sees {devices}", f"set DPAR_PROCESSES={devices}"
    if processes > devices:
        yield blocker("processes", found, advice)
    elif processes < devices:
        yield warning("processes", found, f"{advice} to use all")


def driver_version(path: Path = _DRIVER) -> str | None:
    """Version of the loaded NVIDIA driver; None if there is none."""
    try:
        found = re.search(r"Kernel Module[^\n]*?\s(\d+(?:\.\d+)+)", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _no_device(facts: TorchFacts, runtime: RuntimeConfig, driver: str | None, *, has_device: bool) -> Finding:
    finding = blocker if runtime.device == "cuda" else warning
    if not has_device and driver is None:
        if runtime.device != "cuda":
            return ok("cuda", "no NVIDIA device: models run on the CPU")
        return blocker("cuda", "no NVIDIA device, and runtime.device is cuda", "set DPAR_DEVICE=cpu")
    if facts.cuda is None:
        return finding("cuda", "torch is built without CUDA", "install torch with CUDA: make install")
    oldest = _OLDEST_DRIVERS.get(facts.cuda.partition(".")[0], 0)
    if driver is not None and int(driver.partition(".")[0]) < oldest:
        return finding("cuda", f"driver {driver} is too old for CUDA {facts.cuda}", f"install driver {oldest} or newer")
    found = facts.error or "torch sees no device"
    return finding("cuda", f"there is a device, and {found}", "see nvidia-smi and CUDA_VISIBLE_DEVICES")


def _device(name: str, device: Device) -> Iterator[Finding]:
    about = f"{device.name}, sm {device.capability}, {size(device.memory)}"
    if not device.compiled:
        yield blocker(name, f"{about}: this torch has no kernels for it", "install a torch build for this device")
        return
    if not device.bfloat16:
        yield warning(
            name, f"{about}: no bfloat16 in hardware", "set the precision of every stage to float32, and expect days"
        )
    elif device.free < device.memory / 2:
        yield warning(name, f"{about}, {size(device.free)} free", "end other processes on it, see nvidia-smi")
    else:
        yield ok(name, f"{about}, {size(device.free)} free, bfloat16")
    if device.attention == "padded":
        yield warning(f"{name} attention", f"padded: {device.refusal}", _OPERATORS)
    else:
        yield ok(f"{name} attention", device.attention + (f": {device.refusal}" if device.refusal else ""))
