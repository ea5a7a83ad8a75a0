"""Memory that each preset needs at least, beside the memory of this machine."""

from __future__ import annotations

from collections.abc import Iterator

from conf.load import load_settings, names
from conf.schema import Settings
from pipeline.budget.images import IMAGENET
from pipeline.budget.memory import CONTEXT, forwards, host_memory, trainings
from pipeline.budget.shape import Shape, shape_of
from pipeline.doctor.devices import TorchFacts
from pipeline.doctor.finding import Finding, ok, warning
from pipeline.selection import select
from pipeline.text import size


def check_presets(facts: TorchFacts, memory: int, processes: int) -> Iterator[Finding]:
    """One finding for each preset, with its images counted as ImageNet's.

    Args:
        facts: The devices; without any, models are in the memory of the host.
        memory: Memory of the host, bytes.
        processes: Processes that a stage runs in.
    """
    cards = [device.memory for device in facts.devices]
    for name in names("preset"):
        settings, _ = load_settings(name)
        shape = shape_of(settings, *IMAGENET, "ImageNet")
        device = least_device_memory(settings, shape, processes)
        host = max(host_memory(settings, shape, processes, cuda=bool(cards)).values())
        if cards:
            yield _on_cards(name, device + CONTEXT, host, min(cards), memory)
        else:
            yield _on_cpu(name, host + processes * device, memory)


def least_device_memory(settings: Settings, shape: Shape, devices: int) -> float:
    """Bytes of the stage that needs most: trainings at one image at a time, others at the settings' batch size."""
    wanted = set(select(settings))
    found = {name: training.at(1) for name, training in trainings(settings, shape, devices).items()}
    return max(needed for name, needed in (forwards(settings, shape) | found).items() if name in wanted)


def _on_cards(name: str, device: float, host: float, card: int, memory: int) -> Finding:
    found = f"needs {size(device)} on a device, {size(host)} on the host"
    if device > card:
        return warning(
            f"preset {name}", f"{found}; a device has {size(card)}", "use a larger device, or lower batch sizes"
        )
    if host > memory:
        return warning(f"preset {name}", f"{found}; the host has {size(memory)}", "use fewer processes: DPAR_PROCESSES")
    return ok(f"preset {name}", found)


def _on_cpu(name: str, host: float, memory: int) -> Finding:
    found = f"needs {size(host)} on the CPU"
    if host > memory:
        return warning(f"preset {name}", f"{found}; there are {size(memory)}", "use a GPU, or lower batch sizes")
    return ok(f"preset {name}", found)
