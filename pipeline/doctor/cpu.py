"""Checks of CPU, memory and compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

from conf.runtime import RuntimeConfig
from pipeline.doctor.devices import TorchFacts
from pipeline.doctor.finding import Finding, blocker, ok, warning
from pipeline.text import size

SLOW_BFLOAT16 = "set every precision to float32, e.g. --set train.training.precision=float32"
_SLOWER = 3.0  # times as long as float32: then bfloat16 is emulated
_ENOUGH_MEMORY = 4e9  # bytes; the demo needs them
_SMALL_SHARED = 1e9


def check_cores(cores: int, of_machine: int, runtime: RuntimeConfig) -> Finding:
    """Cores that this process may use."""
    found = f"{cores} cores" if cores >= of_machine else f"{cores} of {of_machine} cores (affinity, control group)"
    if runtime.processes > cores:
        return warning("cores", f"{found}, runtime.processes is {runtime.processes}", f"set DPAR_PROCESSES={cores}")
    return ok("cores", found)


def check_bfloat16(facts: TorchFacts, flags: Sequence[str]) -> Finding:
    """Speed of bfloat16 on the CPU."""
    rates = {name: rate / 1e9 for name, rate in facts.rates.items()}
    if not rates:
        return warning("bfloat16 on the CPU", "not measured, torch cannot be imported", "see torch")
    found = f"{rates['bfloat16']:,.3g} GFLOP/s, float32 {rates['float32']:,.3g}, {' '.join(flags) or 'no AVX-512'}"
    if facts.devices or rates["bfloat16"] * _SLOWER > rates["float32"]:
        return ok("bfloat16 on the CPU", found)
    return warning("bfloat16 on the CPU", found, SLOW_BFLOAT16)


def check_memory(usable: int, available: int) -> Finding:
    """Memory of the host that this process may use, and what of it is available now."""
    found = f"{size(usable)}, {size(min(available, usable))} available"
    if usable < _ENOUGH_MEMORY:
        return warning("memory", found, "the demo needs 4 GB: lower batch sizes")
    return ok("memory", found)


def check_shared_memory(total: int | None, facts: TorchFacts) -> Finding:
    """Size of /dev/shm, which NCCL uses between processes of a machine."""
    found = "no /dev/shm" if total is None else size(total)
    if len(facts.devices) > 1 and (total or 0) < _SMALL_SHARED:
        return warning("/dev/shm", found, "NCCL needs more: run the container with --ipc=host or --shm-size=8g")
    return ok("/dev/shm", found)


def check_compiler(runtime: RuntimeConfig, facts: TorchFacts, environment: Mapping[str, str] = os.environ) -> Finding:
    """A C++ compiler, which torch.compile needs. Training on a GPU is compiled unless the settings say no."""
    wanted = [name for name in (environment.get("CXX"), "g++", "clang++") if name]
    found = next(filter(None, map(shutil.which, wanted)), None)
    if found is not None:
        return ok("C++ compiler", found)
    if runtime.compile:
        return blocker("C++ compiler", "none, and runtime.compile is on", "install g++, or set DPAR_COMPILE=false")
    if runtime.compile is None and facts.devices:
        return warning("C++ compiler", "none: training is not compiled", "install g++ for faster steps")
    return ok("C++ compiler", "none: torch.compile cannot be used")


def check_torch(facts: TorchFacts) -> Iterator[Finding]:
    """Whether torch can be imported."""
    if facts.version is None:
        yield blocker("torch", facts.error, "install the versions of constraints.txt: make install")
