"""Facts about torch and its devices, gathered in a process of their own: `python -m pipeline.doctor.devices` as JSON.

Importing torch takes seconds, and a broken CUDA installation may end the process that imports it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.processes import CODE_ROOT, own_python, python_path

_TIMEOUT_S = 60.0
_HEAD_DIM = 64  # of the models' attention heads
_PRODUCT = 512  # rows of the timed matrix product


@dataclass(frozen=True, kw_only=True)
class Device:
    """A CUDA device.

    Attributes:
        name: Its product name.
        memory: Bytes in all.
        free: Bytes that no process uses.
        capability: Compute capability, e.g. `9.0`.
        bfloat16: Whether it has bfloat16 in hardware.
        compiled: Whether torch has kernels for it.
        attention: Backend of packed attention in bfloat16.
        refusal: Why it is not xformers; empty if it is.
    """

    name: str
    memory: int
    free: int
    capability: str
    bfloat16: bool
    compiled: bool
    attention: str
    refusal: str


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """Torch on this machine.

    Attributes:
        version: Version; None if it cannot be imported.
        cuda: CUDA version that it is built for; None if it is built without.
        error: Why torch cannot be imported, or why it sees no CUDA device; empty if it sees one.
        devices: The CUDA devices that it sees.
        rates: Rate of a matrix product on the CPU by precision, FLOP/s.
    """

    version: str | None = None
    cuda: str | None = None
    error: str = ""
    devices: tuple[Device, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> TorchFacts:
        """Facts from their JSON."""
        devices = tuple(Device(**device) for device in fields.pop("devices"))
        return cls(**fields, devices=devices)


def torch_facts() -> TorchFacts:
    """Gather the facts in a child process."""
    environment = os.environ | {"PYTHONPATH": python_path(CODE_ROOT)}
    command = own_python("-m", "pipeline.doctor.devices")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode == 0:
            return TorchFacts.of_json(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return TorchFacts(error=f"importing torch took more than {_TIMEOUT_S:.0f} s")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return TorchFacts(error=lines[-1] if lines else f"exit code {done.returncode}")


def _gather() -> TorchFacts:
    import torch

    from pipeline.budget.cards import product_rate
    from stages.runtime.cores import available_cores

    torch.set_num_threads(available_cores())
    rates = {name: product_rate(getattr(torch, name), _PRODUCT) for name in ("float32", "bfloat16")}
    error = ""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as reason:  # built without CUDA; no driver, or one that is too old
        error = " ".join(str(reason).split())
    devices = tuple(_device(number) for number in range(torch.cuda.device_count())) if not error else ()
    return TorchFacts(version=torch.__version__, cuda=torch.version.cuda, error=error, devices=devices, rates=rates)


def _device(number: int) -> Device:
    import torch

    from models.attention import backend_refusal, packed_backend

    place = torch.device("cuda", number)
    properties = torch.cuda.get_device_properties(place)
    capability = (properties.major, properties.minor)
    free, _ = torch.cuda.mem_get_info(place)
    return Device(
        name=properties.name,
        memory=properties.total_memory,
        free=free,
        capability="{}.{}".format(*capability),
        bfloat16=capability >= (8, 0),
        compiled=_has_kernels(capability, torch.cuda.get_arch_list()),
        attention=packed_backend(place, torch.bfloat16, _HEAD_DIM),
        refusal=backend_refusal("xformers", place, torch.bfloat16, _HEAD_DIM) or "",
    )


def _has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a build runs on a device: machine code of the same major version, or code to compile at start."""
    major, minor = capability
    for name in built:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        for_major, for_minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and for_major == major and for_minor <= minor:
            return True
        if kind == "compute" and (for_major, for_minor) <= capability:
            return True
    return False


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_gather())))
